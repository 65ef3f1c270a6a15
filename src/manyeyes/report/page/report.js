// The report of a run, an evaluation or a cross-validation: its cards in order.
"use strict";

const KINDS = {run: "a run", evaluation: "an evaluation", crossval: "a cross-validation"};

function showNotices() {
  if (!report.notices.length) return;
  byId("main").append(make("ul", {className: "notices"}, ...report.notices.map(text => make("li", {textContent: text}))));
}

function figuresTable(figures, confidence) {
  const level = `${levelText(confidence)} interval`;
  // Of one scale, so that they can be compared by eye: down to the tenth below the lowest.
  const from = Math.floor(10 * Math.min(0.9, ...figures.filter(figure => figure.form === "share" && figure.low !== null).map(figure => figure.low))) / 10;
  return plainTable(["Figure", "Value", level, `${percent(from, 0)} to 100${NBSP}%`], figures.map(figure => [
    make("span", {className: "stacked"}, figure.title, make("small", {textContent: figure.meaning})),
    make("b", {textContent: valueText(figure, figure.value)}),
    make("span", {textContent: between(figure.low, figure.high, figure.form), title: figure.low === null ? "" : figure.method}),
    figure.form === "share" && figure.low !== null ? miniature(from, figure.low, figure.value, figure.high) : "",
  ]), "Figures with intervals");
}

/** The figure that one looks for first, large. */
function headline(figure, about) {
  return make("div", {className: "headline"}, make("p", {className: "soft", textContent: figure.title}), make("p", {className: "large", textContent: valueText(figure, figure.value)}),
    make("p", {className: "soft", textContent: about}));
}

function showSummary(names) {
  const {metrics, figures} = report;
  const level = `${levelText(metrics.confidence)} interval`;
  const named = name => figures.find(figure => figure.name === name);
  const heads = ["accuracy", "balanced_accuracy", "macro_f1", "log_loss"].map(named).filter(Boolean)
    .map(figure => headline(figure, figure.low === null ? "" : `${level} ${between(figure.low, figure.high, figure.form)}`));
  const methods = [...new Map(figures.filter(figure => figure.low !== null).map(figure => [figure.method, figures.filter(other => other.method === figure.method && other.low !== null)]))];
  const missing = figures.filter(figure => figure.low === null);
  section("summary", report.kind === "crossval" ? "Pooled predictions" : "Summary",
    make("p", {className: "soft", textContent: report.kind === "crossval"
      ? `The held-out predictions of all folds of the first repeat together: ${plural(metrics.num_examples, "image")}, each once, of ${plural(names.length, "class")}. Their intervals take the ${report.folds.filter(fold => fold.repeat === 0).length} models for one.`
      : `${plural(metrics.num_examples, "image")} of ${report.on.split}, ${plural(names.length, "class")}.`}),
    make("div", {className: "headlines"}, ...heads), figuresTable(figures, metrics.confidence),
    folded("How the intervals are made", make("dl", {}, ...methods.flatMap(([method, of]) => [make("dt", {textContent: method}), make("dd", {textContent: of.map(figure => figure.title).join(", ")})]),
      ...(missing.length ? [make("dt", {textContent: "no interval"}), make("dd", {textContent: `${missing.map(figure => figure.title).join(", ")}: these examples don't tell, as where there is no mistake`})] : []))));
}

function showFolds() {
  const {fold_figures: figures, folds} = report, repeats = new Set(folds.map(fold => fold.repeat)).size;
  const level = `${levelText(report.metrics.confidence)} interval`;
  const plots = figures.map(figure => make("figure", {className: "plot"}, make("figcaption", {}, make("b", {textContent: figure.title})),
    intervalChart({label: `${figure.title}: mean ${valueText(figure, figure.value)}, ${between(figure.low, figure.high, figure.form)}`,
      rows: [{name: "", value: figure.value, low: figure.low, high: figure.high, dots: folds.map(fold => fold.figures[figure.name])}],
      text: (value, isTick) => figure.form === "share" ? (isTick ? +(100 * value).toPrecision(4) + "%" : percent(value, 2)) : isTick ? tickText(value) : decimal(value)})));
  const heads = figures.map(figure => headline(figure, `${figure.low === null ? "" : `${level} ${between(figure.low, figure.high, figure.form)}, `}std ${valueText(figure, figure.std)}`));
  const rows = folds.map(fold => [repeats > 1 ? `repeat ${fold.repeat}, fold ${fold.fold}` : `fold ${fold.fold}`, counted(fold.num_train), counted(fold.num_val), counted(fold.num_held_out), ...figures.map(figure => valueText(figure, fold.figures[figure.name])), String(fold.best_epoch ?? fold.epochs), fold.seconds.toFixed(0) + NBSP + "s"]);
  section("folds", "Folds", make("p", {className: "soft", textContent: `Means over ${plural(folds.length, "fold")}, each of which was held out from the training of its model. Intervals: ${figures[0].method}.`}),
    make("div", {className: "headlines"}, ...heads), make("p", {className: "soft", textContent: "Rings are folds, the line their mean, the band its interval."}), make("div", {className: "halves"}, ...plots),
    folded("Every fold", plainTable(["Fold", "Trained on", "Val", "Held out", ...figures.map(figure => figure.title), "Best epoch", "Time"], rows, "Every fold")));
}

function showLearning() {
  const {curves} = report;
  if (!curves.length) return;
  const isOne = curves.length === 1, x = curve => curve.epochs.map(epoch => epoch.epoch);
  const of = (key, name, style) => curves.map((curve, index) => ({name: isOne ? name : `${curve.name} ${name}`, isUnnamed: !isOne, style: isOne ? style : `${style} thin`, points: x(curve).map((epoch, at) => [epoch, curve.epochs[at][key]])}));
  const hasVal = curves.some(curve => curve.epochs.some(epoch => epoch.val_accuracy !== null && epoch.val_accuracy !== undefined));
  const plots = [
    lineChart({title: "Accuracy", xTitle: "epoch", form: "share", series: [...of("accuracy", "train", "series-2"), ...(hasVal ? of("val_accuracy", "val", "series-1") : [])]}),
    lineChart({title: "Loss", xTitle: "epoch", form: "number", series: [...of("loss", "train", "series-2"), ...(hasVal ? of("val_loss", "val", "series-1") : [])]}),
  ];
  if (isOne) {
    const {steps} = curves[0];
    plots.push(lineChart({title: "Loss by step", xTitle: "step", form: "number", series: [{name: "train", style: "series-2 thin", points: steps.map(step => [step.global_step, step.loss])}]}),
      lineChart({title: "Learning rate", xTitle: "step", form: "rate", isFromZero: true, series: [{name: "rate", style: "series-3", points: (steps.length ? steps : curves[0].epochs).map(step => [step.global_step, step.learning_rate])}]}));
  }
  const text = (value, digits) => value === null || value === undefined ? NONE : digits ? percent(value, digits) : decimal(value);
  const rows = curves.flatMap(curve => curve.epochs.map(epoch => [`${curve.name ? curve.name + ", " : ""}${epoch.epoch}`, text(epoch.loss), text(epoch.accuracy, 2), text(epoch.val_loss), text(epoch.val_accuracy, 2), (epoch.seconds ?? 0).toFixed(1) + NBSP + "s"]));
  section("learning", "Learning", make("p", {className: "soft", textContent: "Train figures are of the weights as they changed, under augmentation and dropout, so that val may be better."
    + (isOne ? "" : " Orange: train, teal: val; a line for each fold.")}),
    make("div", {className: "halves"}, ...plots.filter(Boolean)), folded("Every epoch", plainTable(["Epoch", "Loss", "Accuracy", "Val loss", "Val accuracy", "Time"], rows, "Every epoch")));
}

function showProvenance() {
  const settings = Object.entries(report.settings);
  const blocks = report.provenance.map(block => block.title === "Commands"
    ? make("div", {className: "stack whole"}, make("h3", {textContent: "To make it again"}), make("pre", {tabIndex: 0, textContent: block.facts.map(([, line]) => line).join("\n")}))
    : make("div", {className: "stack"}, make("h3", {textContent: block.title}), make("dl", {}, ...block.facts.flatMap(([term, value]) => [make("dt", {textContent: term}), make("dd", {textContent: value})]))));
  section("provenance", "Provenance", make("div", {className: "halves"}, ...blocks),
    settings.length ? folded("Every setting of the training", make("dl", {}, ...settings.flatMap(([name, value]) => [make("dt", {textContent: name}), make("dd", {textContent: value})]))) : null);
}

function showReport() {
  const names = report.class_names;
  byId("on").textContent = `Report of ${KINDS[report.kind]}${report.on ? ` · ${lastPart(report.on.dataset)}` : ""}`;
  byId("footer").textContent = `Made by ${report.made.by} on ${report.made.at.replace("T", " ").replace("+00:00", " UTC")}; ${report.made.on}. This page asks nothing of any machine.`;
  showNotices();
  if (report.folds) showFolds();
  if (report.metrics) showSummary(names);
  showLearning();
  if (report.metrics) {
    showMatrix(names);
    showClasses(names);
    showCalibration();
  }
  showExamples(names);
  showData(names);
  showProvenance();
}
showReport();
