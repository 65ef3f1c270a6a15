// What became of every input of the dataset.
"use strict";

const MAX_BARS = 40;

function showData(names) {
  const {balance} = report;
  if (!balance) return;
  const order = ["train", "val", "test"], splits = Object.entries(balance.written).sort(([a], [b]) => order.indexOf(a) - order.indexOf(b)), written = sum(splits.map(([, counts]) => sum(counts)));
  const quarantined = sum(Object.values(balance.quarantined)), skipped = sum(Object.values(balance.skipped));
  const parts = [["written", written, "series-1"], ["quarantined", quarantined, "series-2"], ["skipped", skipped, "series-3"]];
  const flow = labelled(make("div", {className: "flow"}, ...parts.filter(([, number]) => number).map(([, number, style]) => {
    const part = make("span", {className: "fill " + style});
    part.style.flexGrow = number;
    return part;
  })), parts.map(([name, number]) => `${counted(number)} ${name}`).join(", "), "img");
  const told = make("p", {}, make("b", {textContent: counted(balance.num_seen)}), ` seen = ${parts.map(([name, number]) => `${counted(number)} ${name}`).join(" + ")}`,
    ...(balance.num_seen === written + quarantined + skipped ? [] : [make("b", {className: "wrong", textContent: " – the counts do not balance"})]));
  const reasons = [...Object.entries(balance.quarantined).map(([reason, number]) => [words(reason), "quarantined", counted(number)]),
    ...Object.entries(balance.skipped).map(([reason, number]) => [words(reason), "skipped", counted(number)])];
  const spread = counts => { const known = [...counts].sort((a, b) => a - b); return [known[0], known[known.length >> 1], known.at(-1)].map(counted); };
  const bySplit = plainTable(["Split", "Images", "Share", "Fewest of a class", "Median", "Most"], splits.map(([name, counts]) => [name, counted(sum(counts)), percent(sum(counts) / written), ...spread(counts)]), "Images by split");
  section("data", "Data", make("p", {className: "soft", textContent: `${balance.uri}${balance.view_of ? `, a view of ${balance.view_of}` : ""}` }), told, flow,
    make("div", {className: "halves"}, bySplit, reasons.length ? plainTable(["Reason", "Became", "Inputs"], reasons, "What was left out, and why") : make("p", {className: "soft", textContent: "Nothing was left out."})),
    make("h3", {textContent: "Images by class"}), names.length <= MAX_BARS ? classBars(splits, names) : classCurve(splits, names),
    ...refusedOf(balance));
}

/** A bar for each class, in parts for the splits. */
function classBars(splits, names) {
  const totals = names.map((_, label) => sum(splits.map(([, counts]) => counts[label]))), most = Math.max(...totals, 1);
  const keys = make("p", {className: "keys"}, ...splits.map(([name], index) => make("span", {className: "key " + SERIES[index % 4], textContent: name})));
  return make("div", {}, keys, make("dl", {className: "bars"}, ...names.flatMap((name, label) => {
    const bar = make("span", {className: "flow"}, ...splits.map(([split, counts], index) => {
      const part = make("span", {className: "fill " + SERIES[index % 4], title: `${split}: ${counted(counts[label])}`});
      part.style.width = `${100 * counts[label] / most}%`;
      return part;
    }));
    return [make("dt", {textContent: name, title: name}), make("dd", {}, bar, make("span", {textContent: counted(totals[label])}))];
  })));
}

/** Of many classes: how many images the largest has, the second largest, and so on. */
function classCurve(splits, names) {
  const sorted = splits.map(([name, counts], index) => ({name, style: SERIES[index % 4], isNamed: true, points: [...counts].sort((a, b) => b - a).map((number, rank) => [rank + 1, number])}));
  const chart = lineChart({title: "from the most frequent class to the rarest", series: sorted, xTitle: "class", form: "rate", isFromZero: true});
  const total = names.map((name, label) => [name, sum(splits.map(([, counts]) => counts[label]))]).sort((a, b) => a[1] - b[1]);
  return make("div", {className: "wide-and-narrow"}, chart, plainTable(["Rarest classes", "Images"], total.slice(0, 8).map(([name, number]) => [name, counted(number)]), "Rarest classes"));
}

function refusedOf(balance) {
  if (!balance.refused.length) return [];
  return [make("h3", {textContent: "In quarantine"}), make("p", {className: "soft", textContent: "Some of each reason; files of up to 64 KiB are kept, and shown as far as they can be decoded."}),
    make("ul", {className: "gallery"}, ...balance.refused.map(each => make("li", {},
      make("div", {className: "stage"}, each.image ? make("img", {src: each.image, alt: lastPart(each.path)}) : make("span", {className: "soft", textContent: "no picture"})),
      make("p", {}, make("b", {textContent: words(each.reason)})), make("p", {className: "soft", textContent: each.detail}), make("p", {className: "path", textContent: each.path, title: each.path}))))];
}
