// The ways in: files, the clipboard, drag and drop. Loaded last, it starts the page.
"use strict";

const chooser = element("file");
element("choose").onclick = () => chooser.click();
chooser.onchange = () => { if (chooser.files.length) take(chooser.files); chooser.value = ""; };
document.addEventListener("paste", event => {
  const files = [...event.clipboardData.files], images = files.filter(file => file.type.startsWith("image/"));
  if (!files.length && event.target.closest?.("input")) return;
  take(images.length ? images : files, ["There is no image on the clipboard.", "Copy an image, then paste it here."]);
});
let depth = 0;
document.addEventListener("dragenter", () => { depth++; document.body.classList.add("dragging"); });
document.addEventListener("dragleave", () => { if (--depth <= 0) { depth = 0; document.body.classList.remove("dragging"); } });
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files, ["That was not a file.", "Drop images from your disk."]);
});

let ready = loadModels();
