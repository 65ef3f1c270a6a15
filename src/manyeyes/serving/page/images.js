// Images, one or several, and their answers.
"use strict";

function take(files, otherwise) {
  files = [...files];
  if (!files.length) return showProblem(new Problem(...otherwise));
  stopCamera();
  entries.forEach(entry => URL.revokeObjectURL(entry.url));
  entries = files.map(file => ({file, url: URL.createObjectURL(file)}));
  current = entries[0];
  element("explain").checked = false;
  recognizeAll(entries);
}

async function recognizeAll(wanted) {
  if (!wanted.length) return;
  hideProblem();
  const left = [...wanted], run = ++lastRun;
  for (const entry of left) Object.assign(entry, {answer: null, problem: null});
  element("main").classList.add("busy");
  showStrip();
  await ready;
  await Promise.all(Array.from({length: IN_FLIGHT}, async () => {
    while (left.length && run === lastRun) await recognize(left.shift(), run);
  }));
  if (run !== lastRun) return;
  element("main").classList.remove("busy");
  const failed = entries.filter(entry => entry.problem).length;
  if (entries.length > 1) speak(`${plural(entries.length - failed, "image")} recognised` + (failed ? `, ${failed} failed` : ""));
}

let missed = "";
async function askRecognition(body) {
  const answer = await (await ask("v1/recognize?" + queryOf({top_k: TOP_K}), {body})).json();
  const {name, version} = answer.model;
  const isListed = models.some(model => model.name === name && model.versions.some(card => card.version === version));
  // The server has a new version by now; its card is read once.
  if (chosen && !isListed && version !== missed) { missed = version; ready = loadModels(); }
  return answer;
}

async function recognize(entry, run) {
  const started = performance.now();
  try {
    const answer = await askRecognition(entry.file);
    if (run !== lastRun) return;
    Object.assign(entry, {answer, roundTrip: performance.now() - started, label: answer.predictions[0].label});
  } catch (problem) {
    if (run !== lastRun) return;
    entry.problem = problem;
  }
  showStrip();
  if (entry === current) show();
}

function showStrip() {
  const strip = element("strip"), hadFocus = strip.contains(document.activeElement);
  strip.hidden = entries.length < 2;
  strip.replaceChildren(...(strip.hidden ? [] : entries.map(entry => {
    const best = entry.answer?.predictions[0];
    const button = make("button", {type: "button", onclick: () => { current = entry; showStrip(); show(); }},
      make("img", {src: entry.url, alt: ""}),
      make("span", {textContent: best ? best.class_name : entry.problem ? "failed" : "…"}),
      make("span", {className: "soft", textContent: best ? percent(best.probability) : entry.file.name}));
    button.setAttribute("aria-current", entry === current);
    button.title = entry.file.name;
    return make("li", {}, button);
  })));
  if (hadFocus) strip.querySelector("[aria-current=true]")?.focus();
}

/** Show the current image with its answer, or why there is none. */
function show() {
  const {answer, problem, roundTrip} = current;
  element("result").hidden = !answer;
  element("main").classList.toggle("answered", Boolean(answer));
  if (problem) {
    speak("");
    const title = (entries.length > 1 ? current.file.name + ": " : "") + problem.message;
    return showProblem({...problem, message: title}, problem.mayPass && (() => recognizeAll(entries)));
  }
  hideProblem();
  if (!answer) return;
  showPicture();
  showAnswer(answer);
  const {queue, decode, predict} = answer.timings_ms;
  element("timing").textContent = `queue ${milliseconds(queue)} · decode ${milliseconds(decode)} · predict ${milliseconds(predict)} · round trip ${milliseconds(roundTrip)} · version ${answer.model.version}`;
  element("why").hidden = element("hint").hidden = false;
  const [best] = answer.predictions;
  if (entries.length === 1) speak(`${best.class_name}, ${percent(best.probability)}${answer.abstain ? UNSURE : ""}`);
  explain();
}

function showPicture() {
  const {file, url} = current, picture = element("picture");
  const name = file.name || "Pasted image", kilobytes = Math.max(1, Math.round(file.size / 1024)).toLocaleString("en");
  const caption = size => { element("caption").textContent = [name, size, kilobytes + " kB"].filter(Boolean).join(" · "); };
  element("video").hidden = true;
  picture.onload = () => {
    picture.hidden = false;
    picture.classList.toggle("tiny", Math.max(picture.naturalWidth, picture.naturalHeight) < 128);
    caption(`${picture.naturalWidth} × ${picture.naturalHeight}`);
  };
  picture.onerror = () => { picture.hidden = true; caption("this browser can't show the format"); };
  picture.alt = name;
  if (picture.src !== url) picture.src = url;
}

/** The classes with their bars. What is there is changed, not made anew, so that focus stays where it is. */
function showAnswer({predictions, abstain}, isLive = false) {
  const [best] = predictions, bars = element("bars");
  element("best").textContent = best.class_name;
  element("lead").textContent = percent(best.probability) + " sure" + (abstain ? UNSURE : "");
  while (bars.children.length > predictions.length) bars.lastChild.remove();
  while (bars.children.length < predictions.length) bars.append(make("li", {}, make("button", {type: "button"},
    make("span", {className: "row"}, make("span"), make("span")),
    make("span", {className: "track"}, make("span", {className: "bar"})))));
  predictions.forEach(({label, class_name, probability}, i) => {
    const button = bars.children[i].firstChild, [name, share] = button.firstChild.children;
    name.textContent = class_name;
    share.textContent = percent(probability);
    button.querySelector(".bar").style.width = Math.max(0.4, 100 * probability) + "%";
    button.disabled = isLive;
    button.setAttribute("aria-pressed", !isLive && label === current.label);
    button.onclick = () => { current.label = label; element("explain").checked = true; show(); };
  });
  element("result").hidden = false;
  element("main").classList.add("answered");
}
