// Several evaluations or cross-validations side by side.
"use strict";

const HOW = {folds: "paired on the same folds", examples: "paired by examples where a p value or “paired” says so", unpaired: "unpaired"};
const withSign = (value, digits) => (value > 0 ? "+" : "") + value.toFixed(digits).replace("-", "−");
// A difference of shares is told in percentage points: "−24 %" would be taken for a part of the first.
const signed = (figure, value) => figure.form === "share" ? withSign(100 * value, 2) + NBSP + "points" : withSign(value, 4);
const signedBounds = (figure, {low, high}) => low === null ? "" : `${signed(figure, low).replace(NBSP + "points", "")} to ${signed(figure, high)}`;

function showComparison() {
  const {entries, against, class_names: names} = report, first = entries[0];
  const figures = [...new Map(entries.flatMap(entry => entry.figures).map(figure => [figure.name, figure])).values()];
  const of = (entry, name) => entry.figures.find(figure => figure.name === name);
  const level = `${levelText(report.confidence)} interval`;
  byId("on").textContent = `Comparison on ${report.split} of ${lastPart(report.dataset)}`;
  byId("footer").textContent = `Made by ${report.made.by}. This page asks nothing of any machine.`;
  if (report.notices.length) byId("main").append(make("ul", {className: "notices"}, ...report.notices.map(text => make("li", {textContent: text}))));

  const best = figure => {
    const values = entries.map(entry => of(entry, figure.name)?.value).filter(value => value !== undefined);
    return figure.is_better_higher ? Math.max(...values) : Math.min(...values);
  };
  section("figures", "Side by side", make("p", {className: "soft", textContent: `${plural(report.num_examples, report.kind === "crossval" ? "held-out image" : "image")}, ${plural(names.length, "class")}. ${level} in grey; the best value is bold, which says nothing of whether the difference is real.`}),
    plainTable(["Figure", ...entries.map(entry => entry.name)], figures.map(figure => [figure.title, ...entries.map(entry => {
      const own = of(entry, figure.name);
      return own ? make("span", {className: "stacked"}, make(own.value === best(figure) ? "b" : "span", {textContent: valueText(figure, own.value)}), make("small", {textContent: between(own.low, own.high, own.form)})) : NONE;
    })]), "Figures side by side"));

  for (const other of against) {
    const rows = other.differences.map(each => {
      const figure = figures.find(candidate => candidate.name === each.name);
      const isClear = each.low !== null && (each.low > 0 || each.high < 0), isBetter = (each.value > 0) === figure.is_better_higher;
      return [figure.title, make("b", {className: isClear ? (isBetter ? "right" : "wrong") : "", textContent: signed(figure, each.value)}),
        make("span", {textContent: signedBounds(figure, each), title: each.method}), each.p_value === null ? "" : each.p_value < 0.001 ? "< 0.001" : each.p_value.toFixed(3)];
    });
    const shares = other.differences.filter(each => each.low !== null && figures.find(figure => figure.name === each.name).form === "share");
    const counts = other.mcnemar;
    section(`against-${against.indexOf(other)}`, `${other.name} less ${first.name}`,
      make("p", {className: "soft", textContent: `Differences ${HOW[other.how]}. Teal: better, orange: worse, by an interval without 0.`}),
      make("div", {className: "halves"}, plainTable(["Figure", "Difference", level, "p"], rows, "Differences"),
        make("figure", {className: "plot"}, make("figcaption", {}, make("b", {textContent: "Differences with intervals, in percentage points"})), intervalChart({label: "Differences with intervals", zero: true,
          rows: shares.map(each => ({name: figures.find(figure => figure.name === each.name).title, value: each.value, low: each.low, high: each.high})), text: (value, isTick) => isTick ? String(+(100 * value).toPrecision(3)) : signed({form: "share"}, value)}))),
      counts ? make("p", {}, make("b", {textContent: counted(counts.only_first)}), ` images only ${other.name} gets right, `, make("b", {textContent: counted(counts.only_second)}), ` only ${first.name}: exact McNemar test, p = ${counts.p_value < 0.001 ? "< 0.001" : counts.p_value.toFixed(3)}.`) : null,
      folded("How the intervals are made", make("dl", {}, ...[...new Set(other.differences.map(each => each.method))].filter(Boolean).flatMap(method => [make("dt", {textContent: method}),
        make("dd", {textContent: other.differences.filter(each => each.method === method).map(each => figures.find(figure => figure.name === each.name).title).join(", ")})]))));
  }
  if (report.kind === "crossval") showFoldsBeside(entries, figures);

  const columns = [{title: "Class", value: label => names[label], cell: label => names[label]},
    ...entries.map(entry => ({title: `F1, ${entry.name}`, narrow: true, value: label => entry.f1[label], cell: label => percent(entry.f1[label])})),
    ...entries.slice(1).map(entry => {
      const difference = label => entry.f1[label] === null || first.f1[label] === null ? null : entry.f1[label] - first.f1[label];
      return {title: `${entry.name} less ${first.name}, points`, narrow: entries.length === 2, value: difference, cell: label => difference(label) === null ? NONE : withSign(100 * difference(label), 1)};
    })];
  section("classes", "Classes", sortableTable({id: "classes-table", label: "F1 of every class", columns, noun: "class", searched: label => names[label], rows: names.map((_, label) => label)}));
}

/** Each figure with its folds. */
function showFoldsBeside(entries, figures) {
  const plots = figures.map(figure => make("figure", {className: "plot"}, make("figcaption", {}, make("b", {textContent: figure.title})), intervalChart({label: figure.title,
    rows: entries.map((entry, index) => { const own = entry.figures.find(each => each.name === figure.name); return {name: entry.name, value: own.value, low: own.low, high: own.high, dots: entry.folds.map(fold => fold[figure.name]), style: SERIES[index % 4]}; }),
    text: (value, isTick) => figure.form === "share" ? (isTick ? +(100 * value).toPrecision(4) + "%" : percent(value, 2)) : isTick ? tickText(value) : decimal(value)})));
  section("folds", "Folds", make("p", {className: "soft", textContent: "Rings are folds, the line their mean, the band its interval. Overlapping bands do not mean that there is no difference: the paired test above looks at each fold by itself."}), make("div", {className: "halves"}, ...plots));
}
showComparison();
