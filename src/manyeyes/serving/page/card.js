// The card of the chosen model: what it is, how good it is, and its classes.
"use strict";

const FIT_TOLD = {resize: "stretched to fit", pad: "padded to fit", cover: "cropped to fit", crop: "cropped to fit", resize_short: "cropped to fit"};
// Of a table's columns: the field of the evaluation, the title, and whether small screens have room for it.
const COLUMNS = [["recall", "Recall", true], ["precision", "Precision", false], ["f1", "F1", false], ["support", "Images", true]];
let order = {by: "label", sign: 1};  // of the table of classes

function showCard(card) {
  element("title").textContent = `Model card: ${card.name}`;
  element("facts").replaceChildren(...factsOf(card).flatMap(([term, value, remark]) => [
    make("dt", {textContent: term}), make("dd", {}, value, ...(remark ? [make("small", {textContent: remark})] : []))]));
  element("search").value = "";
  order = {by: "label", sign: 1};
  showClasses();
  element("about").hidden = false;
}

const between = (confidence, [low, high]) => `${Math.round(100 * confidence)}\u00a0% interval ${percent(low)} to ${percent(high)}`;

/** The bounds of the 95 % Wilson interval of a share of `count`. */
function wilson(share, count) {
  const z = 1.96, z2 = z * z / count, centre = (share + z2 / 2) / (1 + z2);
  const half = z * Math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2);
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

/** What is told of a model, as [term, value, remark]. */
function factsOf(card) {
  const [height, width, channels] = card.input_shape, {parity, provenance, evaluation} = card, {accuracy} = parity;
  const facts = [
    ["Version", card.version],
    ["Input", `${width} × ${height} pixels, ${channels === 1 ? "grey" : "RGB"}`, FIT_TOLD[card.preprocessing.steps[0]?.op]],
    ["Runs by", `${card.backend}, ${card.precision}`],
  ];
  const alone = card.latency_ms_by_batch_size["1"];
  if (alone !== undefined) facts.push(["Speed", `${milliseconds(alone)} for an image`, (card.max_batch_size > 1 ? `up to ${card.max_batch_size} images at a time` : "one image at a time") + ", decoding apart"]);
  const last = path => String(path).split("/").filter(Boolean).pop();
  if (evaluation) {
    const {num_examples: count, split, confidence, top_k_accuracy: top} = evaluation, k = Math.max(...Object.keys(top));
    facts.push(["Accuracy", percent(evaluation.accuracy), `as trained, on ${plural(count, "image")} of ${split}, ${between(confidence, evaluation.accuracy_interval)}`]);
    if (k > 1) facts.push([`Among the top ${k}`, percent(top[k])]);
    facts.push(["Macro F1", percent(evaluation.macro_f1), "mean over the classes"]);
    if (evaluation.dataset_fingerprint !== provenance.dataset_fingerprint) facts.push(["Evaluated on", last(evaluation.dataset), "fingerprint " + evaluation.dataset_fingerprint]);
  } else {
    facts.push(["Accuracy", "not known", "the model was not evaluated before it was exported"]);
  }
  if (accuracy) {
    const {num_images: count, split} = accuracy;
    facts.push([accuracy.labelled ? "As it runs here" : "Agrees with float32", percent(accuracy.accuracy),
      `${plural(count, "image")} of ${split}, ${between(0.95, wilson(accuracy.accuracy, count))}`]);
    if (accuracy.labelled && card.precision !== "float32") facts.push(["In float32", percent(accuracy.float32)]);
  }
  if (parity.num_images) facts.push(["Like trained", percent(parity.top1_agreement),
    `${plural(parity.num_images, "image")} with the same class as before export, ${between(0.95, wilson(parity.top1_agreement, parity.num_images))}`]);
  if (provenance.dataset) facts.push(["Trained on", last(provenance.dataset), provenance.dataset_fingerprint && "fingerprint " + provenance.dataset_fingerprint]);
  if (provenance.run) facts.push(["Run", last(provenance.run), provenance.step && `step ${provenance.step.toLocaleString("en")}`]);
  return facts;
}

/** The classes that are searched for; with their figures, where there are some. */
function showClasses() {
  const {class_names: names, evaluation} = chosen.card, words = element("search").value.toLowerCase().split(/\s+/);
  const found = [...names.keys()].filter(label => words.every(word => names[label].toLowerCase().includes(word)));
  element("count").textContent = found.length === names.length ? plural(names.length, "class")
    : `${found.length.toLocaleString("en")} of ${plural(names.length, "class")}`;
  element("names").classList.toggle("table", Boolean(evaluation));
  element("names").replaceChildren(evaluation ? tableOf(sorted(found), evaluation)
    : make("ul", {}, ...found.map(label => make("li", {textContent: names[label]}))));
}
element("search").oninput = showClasses;

/** Labels in the chosen order; those without a value come last in any. */
function sorted(labels) {
  const {class_names: names, evaluation} = chosen.card, {by, sign} = order;
  if (by === "label") return labels;
  if (by === "name") return labels.sort((a, b) => sign * names[a].localeCompare(names[b], "en", {numeric: true}));
  const values = evaluation[by], isMissing = label => values[label] === null;
  return labels.sort((a, b) => isMissing(a) - isMissing(b) || sign * (values[a] - values[b]) || a - b);
}

function tableOf(labels, evaluation) {
  const heading = (by, title, className = "") => {
    const isOrder = order.by === by;
    const button = make("button", {type: "button", textContent: title, onclick: () => {
      order = {by, sign: isOrder ? -order.sign : 1};
      showClasses();
      element("names").querySelector(`[data-by=${by}]`).focus();
    }});
    button.dataset.by = by;
    const cell = make("th", {scope: "col", className}, button);
    if (isOrder) cell.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
    return cell;
  };
  const narrow = isKept => isKept ? "figure" : "figure wide";
  const cellOf = (label, by, isKept) => {
    const value = evaluation[by][label];
    const cell = make("td", {className: narrow(isKept), textContent: value === null ? "–" : by === "support" ? value.toLocaleString("en") : percent(value)});
    if (by === "recall") {
      cell.classList.add("recall");
      cell.style.setProperty("--share", value ?? 0);
    }
    return cell;
  };
  return make("table", {},
    make("thead", {}, make("tr", {}, heading("name", "Class"), ...COLUMNS.map(([by, title, isKept]) => heading(by, title, narrow(isKept))))),
    make("tbody", {}, ...labels.map(label => make("tr", {}, make("th", {scope: "row", textContent: chosen.card.class_names[label]}),
      ...COLUMNS.map(([by, , isKept]) => cellOf(label, by, isKept))))));
}
