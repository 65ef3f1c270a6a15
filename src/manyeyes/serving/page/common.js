// What the other scripts share: small helpers, what the page knows, and its messages.
"use strict";

const element = id => document.getElementById(id);
const make = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const pause = seconds => new Promise(resolve => setTimeout(resolve, 1000 * seconds));
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : /s$/.test(word) ? "es" : "s"}`;
const percent = p => p >= 0.9995 ? "100\u00a0%" : p < 0.001 ? "<\u00a00.1\u00a0%" : (100 * p).toFixed(1) + "\u00a0%";
const milliseconds = t => t.toFixed(t < 1 ? 2 : t < 10 ? 1 : 0) + "\u00a0ms";

const UNSURE = ": too little to rely on";
const TOP_K = 5, IN_FLIGHT = 4, TRIES_WHEN_BUSY = 5, TOKEN_KEY = "manyeyes-token";
const CAMERA_SIDE = 640;  // the longer side of a frame that is sent: more than models take in, little to carry
let models = [], chosen = null;  // {card, query}: what the chooser says
let entries = [], current = null;  // {file, url, answer, problem, roundTrip, label}
let lastRun = 0;  // what was asked before the last change of images or model is not waited for
let camera = null;  // {stream, stopped} while it runs

function showNotice(text) {
  element("notice").textContent = text;
  element("notice").hidden = !text;
}

/** Tell what went wrong; `again` is what a button does that tries it once more. */
function showProblem(problem, again) {
  element("problem").replaceChildren(make("span", {}, make("b", {textContent: problem.message}), " " + (problem.detail ?? "")));
  if (again) element("problem").append(make("button", {type: "button", className: "button", textContent: "Try again",
    onclick: () => { hideProblem(); again(); }}));
  element("problem").hidden = false;
}
const hideProblem = () => { element("problem").hidden = true; };
const speak = text => { element("spoken").textContent = text; };
