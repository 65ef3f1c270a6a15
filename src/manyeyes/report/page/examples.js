// Pictures that are worth a look.
"use strict";

function gallery(pictures, names) {
  return make("ul", {className: "gallery"}, ...pictures.map(each => {
    const isRight = each.label === each.predicted;
    const image = make("img", {src: each.image, className: each.tiny ? "tiny" : "", alt: `${names[each.label]}, ${lastPart(each.path)}`});
    const overlay = each.overlay && make("img", {src: each.overlay, className: "overlay", hidden: true, alt: `What spoke for ${names[each.predicted]}`});
    return make("li", {}, make("div", {className: "stage"}, image, overlay),
      make("p", {}, make("b", {className: isRight ? "right" : "wrong", textContent: names[each.predicted]}), ` ${percent(each.probability)}`),
      make("p", {className: "soft", textContent: isRight ? "right" : `is ${names[each.label]}`}), make("p", {className: "path", textContent: each.path, title: each.path}));
  }));
}

function showExamples(names) {
  const {mistakes, uncertain} = report, all = [...mistakes, ...uncertain];
  if (!all.length) return;
  const toggle = make("input", {type: "checkbox", id: "overlays", onchange: () => {
    document.querySelectorAll(".gallery .overlay").forEach(image => { image.hidden = !toggle.checked; });
    meaning.hidden = !toggle.checked;
  }});
  const meaning = make("p", {className: "soft", hidden: true}, "What spoke for the predicted class: little ", make("span", {className: "scale"}), " most");
  const parts = [];
  if (mistakes.length) parts.push(make("h3", {textContent: "Most confident mistakes"}), make("p", {className: "soft", textContent: "Each under the class that it was taken for. Wrong labels are often among these."}), gallery(mistakes, names));
  if (uncertain.length) parts.push(make("h3", {textContent: "Least certain"}), make("p", {className: "soft", textContent: "The likeliest class and the next one are nearly as likely."}), gallery(uncertain, names));
  section("examples", "Examples", all.some(each => each.overlay) ? make("div", {className: "tools"}, make("label", {}, toggle, " Show which pixels decided"), meaning) : null, ...parts);
}
