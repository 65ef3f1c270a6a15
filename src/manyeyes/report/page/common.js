// What the other scripts share: the content, and small helpers. Text of others becomes text nodes only.
"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const NBSP = "\u00a0", NONE = "–";

const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
};
const drawn = (tag, attributes = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const percent = (share, digits = 1) => share === null || share === undefined ? NONE : (100 * share).toFixed(digits) + NBSP + "%";
const levelText = confidence => +(100 * confidence).toPrecision(6) + NBSP + "%";
const decimal = (value, digits = 4) => value === null || value === undefined ? NONE : value.toFixed(digits);
const counted = number => number.toLocaleString("en");
const plural = (number, word) => `${counted(number)} ${word}${number === 1 ? "" : /s$/.test(word) ? "es" : "s"}`;
const valueText = (figure, value) => figure.form === "share" ? percent(value, 2) : decimal(value);
const between = (low, high, form) => low === null || high === null ? "" : form === "share"
  ? `${(100 * low).toFixed(2)} to ${percent(high, 2)}` : `${decimal(low)} to ${decimal(high)}`;
const sum = values => values.reduce((total, value) => total + value, 0);
const lastPart = path => String(path).split("/").filter(Boolean).pop() ?? String(path);
const words = name => name.replaceAll("_", " ");

/** A card of the page, which the contents name. */
function section(id, title, ...children) {
  byId("contents").append(make("a", {href: "#" + id, textContent: title}));
  const made = make("section", {className: "card section", id}, make("h2", {id: id + "-title", textContent: title}), ...children);
  made.setAttribute("aria-labelledby", id + "-title");
  byId("main").append(made);
  return made;
}
const byId = id => document.getElementById(id);
const labelled = (element, name, role) => {
  element.setAttribute("aria-label", name);
  if (role) element.setAttribute("role", role);
  return element;
};

/** A plain table: rows of strings or nodes; columns that hold numbers are set to the right. */
function plainTable(titles, rows, caption) {
  const className = index => index ? "figure" : "";
  const cell = (value, index) => index ? make("td", {className: className(index)}, value) : make("th", {scope: "row"}, value);
  return make("div", {className: "scroll"}, make("table", {}, caption ? make("caption", {className: "unseen", textContent: caption}) : null,
    make("thead", {}, make("tr", {}, ...titles.map((title, index) => make("th", {scope: "col", className: className(index), textContent: title})))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map(cell))))));
}
const folded = (title, ...children) => make("details", {}, make("summary", {textContent: title}), ...children);

/** What a token of the style stands for now. */
const token = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const onNewColours = [];
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => onNewColours.forEach(draw => draw()));
