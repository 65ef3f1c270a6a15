// Which pixels decided.
"use strict";

const FIT_OF_STEP = {resize: "fill", pad: "contain"};  // else the image fills the shape and the rest is cut off
let explaining = null;

async function explain() {
  explaining?.abort();
  const isWanted = element("explain").checked && current?.answer && !camera;
  if (!isWanted) return hideExplanation();
  const entry = current, {label, answer} = entry, {class_name} = answer.predictions.find(p => p.label === label);
  const [height, width] = chosen.card.input_shape;
  const signal = (explaining = new AbortController()).signal;
  element("meaning").hidden = false;
  element("meaning").textContent = `Finding the pixels that speak for ${class_name} …`;
  try {
    const query = new URLSearchParams({label, format: "png", model: answer.model.name, version: answer.model.version});
    const content = await (await ask("v1/saliency?" + query, {body: entry.file, signal})).blob();
    if (signal.aborted) return;
    const overlay = element("overlay"), stage = element("stage");
    URL.revokeObjectURL(overlay.src);
    overlay.src = URL.createObjectURL(content);
    overlay.alt = `Which pixels decided for ${class_name}`;
    await overlay.decode();
    if (signal.aborted) return;
    stage.style.setProperty("--ratio", width / height);
    stage.style.setProperty("--fit", FIT_OF_STEP[chosen.card.preprocessing?.steps?.[0]?.op] ?? "cover");
    stage.classList.add("explained");
    overlay.hidden = element("strength").hidden = false;
    element("meaning").replaceChildren("For ", make("b", {textContent: class_name}), ": nothing",
      make("span", {className: "legend"}), "most");
    speak(`Overlay of the pixels that decided for ${class_name} is shown`);
  } catch (problem) {
    // An overlay that was replaced while it was decoded fails too.
    if (signal.aborted) return;
    element("explain").checked = false;
    hideExplanation();
    showProblem(problem instanceof Problem ? problem : new Problem("The overlay can't be shown."));
  }
}

function hideExplanation() {
  element("stage").classList.remove("explained");
  for (const id of ["overlay", "strength", "meaning"]) element(id).hidden = true;
}
element("explain").onchange = explain;
element("opacity").oninput = () => { element("overlay").style.opacity = element("opacity").value / 100; };
