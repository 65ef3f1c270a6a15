// Which models there are, and the card of the chosen one.
"use strict";

const queryOf = extra => new URLSearchParams({...chosen?.query, ...extra});

async function loadModels() {
  try {
    models = (await (await ask("v1/models")).json()).models;
  } catch (problem) {
    return showProblem(problem, () => { ready = loadModels(); });
  }
  const choices = models.flatMap(model => {
    const cardOf = version => model.versions.find(card => card.version === version);
    const canary = model.canary_version && ` (${Math.round(100 * model.canary_weight)} % ${model.canary_version})`;
    return [
      {text: model.name + (canary || ""), group: model.name, card: cardOf(model.default_version), query: {model: model.name}},
      ...(model.versions.length > 1 ? model.versions : []).map(card => (
        {text: `${card.name}, version ${card.version}`, group: model.name, card, query: {model: card.name, version: card.version}})),
    ];
  });
  const same = choices.findIndex(choice => JSON.stringify(choice.query) === JSON.stringify(chosen?.query));
  const first = same >= 0 ? same : Math.max(0, choices.findIndex(choice => models.some(m => m.default && m.name === choice.group)));
  element("models").replaceChildren(...choices.map((choice, i) => make("option", {textContent: choice.text, value: i, selected: i === first})));
  element("models").onchange = () => { choose(choices[element("models").value]); recognizeAll(entries); };
  element("choice").hidden = choices.length < 2;
  choose(choices[first]);
}

function choose(choice) {
  chosen = choice;
  const {card} = choice, classes = plural(card.class_names.length, "class");
  element("model").textContent = element("choice").hidden ? `${card.name} · ${classes} · ${card.backend} ${card.precision}` : "";
  element("title").textContent = `Model card: ${card.name}`;
  element("facts").replaceChildren(...factsOf(card).flatMap(([term, value, remark]) => [
    make("dt", {textContent: term}), make("dd", {}, value, ...(remark ? [make("small", {textContent: remark})] : []))]));
  element("search").value = "";
  showClasses();
  element("about").hidden = false;
  element("example").textContent = `curl --data-binary @photo.jpg ${sessionStorage.getItem(TOKEN_KEY) ? "-H 'Authorization: Bearer TOKEN' " : ""}'${new URL("v1/recognize?" + queryOf({top_k: TOP_K}), location.href)}'`;
}

/** The 95 % Wilson interval of a share of `count`. */
function interval(share, count) {
  const z = 1.96, z2 = z * z / count, centre = (share + z2 / 2) / (1 + z2);
  const half = z * Math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2);
  return `95\u00a0% interval ${percent(Math.max(0, centre - half))} to ${percent(Math.min(1, centre + half))}`;
}

function factsOf(card) {
  const [height, width, channels] = card.input_shape, {parity, provenance} = card, {accuracy} = parity;
  const facts = [
    ["Version", card.version],
    ["Input", `${width} × ${height} pixels, ${channels === 1 ? "grey" : "RGB"}`],
    ["Runs by", `${card.backend}, ${card.precision}`],
  ];
  const alone = card.latency_ms_by_batch_size["1"];
  if (alone !== undefined) facts.push(["Speed", `${milliseconds(alone)} for an image`, (card.max_batch_size > 1 ? `up to ${card.max_batch_size} images at a time` : "one image at a time") + ", decoding apart"]);
  if (accuracy) {
    const {num_images: count, split} = accuracy;
    facts.push([accuracy.labelled ? "Accuracy" : "Agrees with float32", percent(accuracy.accuracy),
      `${plural(count, "image")} of ${split}, ${interval(accuracy.accuracy, count)}`]);
    if (accuracy.labelled && card.precision !== "float32") facts.push(["In float32", percent(accuracy.float32)]);
  }
  if (parity.num_images) facts.push(["Like trained", percent(parity.top1_agreement),
    `${plural(parity.num_images, "image")} with the same class as before export, ${interval(parity.top1_agreement, parity.num_images)}`]);
  const last = path => String(path).split("/").filter(Boolean).pop();
  if (provenance.dataset) facts.push(["Trained on", last(provenance.dataset), provenance.dataset_fingerprint && "fingerprint " + provenance.dataset_fingerprint]);
  if (provenance.run) facts.push(["Run", last(provenance.run), provenance.step && `step ${provenance.step.toLocaleString("en")}`]);
  return facts;
}

function showClasses() {
  const words = element("search").value.toLowerCase().split(/\s+/), names = chosen.card.class_names;
  const found = names.filter(name => words.every(word => name.toLowerCase().includes(word)));
  element("count").textContent = found.length === names.length ? plural(names.length, "class")
    : `${found.length.toLocaleString("en")} of ${plural(names.length, "class")}`;
  element("names").replaceChildren(...found.map(name => make("li", {textContent: name})));
}
element("search").oninput = showClasses;
