// How far probabilities can be believed: accuracy by confidence.
"use strict";

function reliability(found, title) {
  const told = make("p", {className: "readout"}), usual = `calibration error ${decimal(found.ece)}, log loss ${decimal(found.log_loss)}`;
  told.setAttribute("aria-live", "polite");
  told.textContent = usual;
  const known = found.bins.filter(bin => bin.num_examples), most = Math.max(...known.map(bin => bin.num_examples));
  let chosen = -1, marks = [];
  const choose = index => {
    chosen = Math.max(0, Math.min(known.length - 1, index));
    const bin = known[chosen];
    told.textContent = `confidence ${percent(bin.low, 0)} to ${percent(bin.high, 0)}: ${plural(bin.num_examples, "image")}, mean confidence ${percent(bin.confidence)}, right ${percent(bin.accuracy)} (${percent(bin.accuracy_low)} to ${percent(bin.accuracy_high)})`;
    marks.forEach((mark, at) => mark.classList.toggle("chosen", at === chosen));
  };
  const place = responsive(available => {
    const width = Math.min(available, 420), left = 46, right = 10, top = 8, side = width - left - right, below = 52, height = top + side + below + 48;
    const px = share => left + side * share, py = share => top + side * (1 - share), floor = top + side + 10 + below;
    const svg = drawn("svg", {viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true"});
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      svg.append(line(px(0), py(tick), px(1), py(tick), "grid"), line(px(tick), py(0), px(tick), py(1), "grid"),
        textAt(left - 6, py(tick) + 4, 100 * tick + "%", {"text-anchor": "end"}), textAt(px(tick), floor + 14, 100 * tick + "%", {"text-anchor": tick === 1 ? "end" : "middle"}));
    }
    svg.append(line(px(0), py(0), px(1), py(1), "ideal"), textAt(px(0.5), height - 2, "confidence", {"text-anchor": "middle", class: "axis"}),
      drawn("text", {transform: `translate(10 ${py(0.5)}) rotate(-90)`, "text-anchor": "middle", class: "axis"}, "share that is right"));
    marks = known.map((bin, index) => {
      const x = px(bin.confidence), tall = below * bin.num_examples / most;
      const group = drawn("g", {class: "bin"}, drawn("rect", {x: px(bin.low) + 1, y: floor - tall, width: Math.max(1, px(bin.high) - px(bin.low) - 2), height: Math.max(1, tall), class: "histogram"}),
        line(x, py(bin.confidence), x, py(bin.accuracy), "gap"), line(x, py(bin.accuracy_low), x, py(bin.accuracy_high), "whisker"), drawn("circle", {cx: x, cy: py(bin.accuracy), r: 5, class: "dot series-1"}),
        drawn("rect", {x: px(bin.low), y: top, width: px(bin.high) - px(bin.low), height: floor - top, class: "catch"}));
      group.addEventListener("pointerenter", () => choose(index));
      return group;
    });
    svg.append(...marks);
    svg.addEventListener("pointerleave", () => { chosen = -1; told.textContent = usual; marks.forEach(mark => mark.classList.remove("chosen")); });
    return svg;
  });
  labelled(place, `Reliability: ${title}. Arrow keys go through the bins.`, "application");
  place.tabIndex = 0;
  place.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step) { choose(chosen < 0 ? (step > 0 ? 0 : known.length - 1) : chosen + step); event.preventDefault(); }
  });
  return make("figure", {className: "plot"}, make("figcaption", {}, make("b", {textContent: title})), place, told);
}

function showCalibration() {
  const [after, before] = report.metrics.calibration;
  const plots = before ? [reliability(before, "Before calibration, temperature 1"), reliability(after, `As it answers, temperature ${+after.temperature.toPrecision(3)}`)]
    : [reliability(after, after.temperature === 1 ? "As it answers, not calibrated" : `As it answers, temperature ${+after.temperature.toPrecision(3)}`)];
  const rows = after.bins.filter(bin => bin.num_examples).map(bin => [`${percent(bin.low, 0)} to ${percent(bin.high, 0)}`, counted(bin.num_examples), percent(bin.confidence), percent(bin.accuracy), `${percent(bin.accuracy_low)} to ${percent(bin.accuracy_high)}`]);
  section("calibration", "Calibration", make("p", {className: "soft", textContent: "Of answers with a confidence of 80 % four in five should be right: dots on the dashed line. Below it the model is too sure, above it too modest. Whiskers are Wilson score intervals; bars tell how many images there are."}),
    make("div", {className: "halves"}, ...plots), folded("The same as a table", plainTable(["Confidence", "Images", "Mean confidence", "Right", "Interval"], rows, "Accuracy by confidence")));
}
