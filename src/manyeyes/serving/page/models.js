// Which models there are, and which one is asked.
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
  showCard(card);
  element("example").textContent = `curl --data-binary @photo.jpg ${sessionStorage.getItem(TOKEN_KEY) ? "-H 'Authorization: Bearer TOKEN' " : ""}'${new URL("v1/recognize?" + queryOf({top_k: TOP_K}), location.href)}'`;
}
