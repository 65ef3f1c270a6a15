// Every class with its figures.
"use strict";

function showClasses(names) {
  const {classes, confidence} = report.metrics, level = levelText(confidence);
  const train = report.balance?.written?.train;
  const share = (key, title, narrow, bar = false) => ({title, narrow, bar, value: label => classes[key][label], cell: label => percent(classes[key][label])});
  const bounds = (key, has) => ({
    title: "interval", narrow: false, value: label => has(label) ? classes[key + "_low"][label] : null,
    cell: label => has(label) ? `${(100 * classes[key + "_low"][label]).toFixed(1)}–${(100 * classes[key + "_high"][label]).toFixed(1)}` : "",
  });
  const number = (title, of, narrow) => ({title, narrow, value: label => of[label], cell: label => counted(of[label])});
  const columns = [
    {title: "Class", value: label => names[label], cell: label => names[label]},
    share("recall", "Recall", true, true),
    bounds("recall", label => classes.support[label] > 0),
    share("precision", "Precision", false),
    bounds("precision", label => classes.predicted[label] > 0),
    share("f1", "F1", true),
    share("roc_auc", "AUC", false),
    share("average_precision", "Average precision", false),
    number("Images", classes.support, true),
    ...(train ? [number("Trained on", train, false)] : []),
  ];
  const said = [];
  const {num_classes_without_support: without, num_classes_never_predicted: never, num_classes_left_out: leftOut} = report.metrics;
  if (without) said.push(`${plural(without, "class")} without examples here`);
  if (never) said.push(`${plural(never, "class")} never predicted`);
  const table = sortableTable({id: "classes-table", label: "Classes and their figures", columns, noun: "class", searched: label => names[label],
    rows: names.map((_, label) => label), order: names.length > 30 ? {by: 5, sign: 1} : null});
  section("classes", "Classes", make("p", {className: "soft", textContent: `Recall: share of a class's images that were recognised; precision: share of what was taken for it that is of it. Intervals are ${level} Wilson score intervals, in percent. `
    + (said.length ? `${said.join(" and ")}: such values are ${NONE} and count as 0 in the averages.` : "")
    + (leftOut ? ` ${plural(leftOut, "class")} with neither: left out of the averages.` : "")}), table);
}
