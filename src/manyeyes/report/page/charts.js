// Charts as SVG, drawn anew for every width.
"use strict";

const SERIES = ["series-1", "series-2", "series-3", "series-4"];

/** A place that `draw(width)` fills with an SVG, again when its width changes. */
function responsive(draw, className = "chart") {
  const place = make("div", {className});
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(place.clientWidth);
    if (now && now !== width) {
      width = now;
      place.replaceChildren(...[draw(width)].flat());
    }
  }).observe(place);
  return place;
}

/** About `wanted` round values that span low to high. */
function ticksOf(low, high, wanted = 4) {
  if (!(high > low)) return [low];
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= raw * 0.7);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}
const textAt = (x, y, content, attributes = {}) => drawn("text", {x, y, ...attributes}, content);
const line = (x1, y1, x2, y2, className) => drawn("line", {x1, y1, x2, y2, class: className});
const tickText = value => Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(0) : String(+value.toPrecision(6));

/**
 * Lines over a common x. series: {name, points: [[x, y], …], style: class names}. The nearest x is told where one points, or goes by
 * the arrow keys.
 */
function lineChart({title, series, xTitle, form, isFromZero = false}) {
  const kept = series.map(each => ({...each, points: each.points.filter(([, y]) => y !== null && y !== undefined)})).filter(each => each.points.length);
  const all = kept.flatMap(each => each.points), xs = [...new Set(all.map(([x]) => x))].sort((a, b) => a - b);
  if (!all.length) return null;
  const yText = (value, digits) => form === "share" ? percent(value, digits) : form === "rate" ? String(+value.toPrecision(3)) : decimal(value);
  let [low, high] = [Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y))];
  if (isFromZero) low = Math.min(0, low);
  if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  const pad = (high - low) * 0.05;
  [low, high] = [isFromZero && low === 0 ? 0 : low - pad, high + pad];
  if (form === "share") [low, high] = [Math.max(0, low), Math.min(1, high)];
  const told = make("p", {className: "readout"});
  told.setAttribute("aria-live", "polite");
  const usual = "at the end: " + kept.slice(0, 6).map(each => `${each.name} ${yText(each.points.at(-1)[1], 2)}`).join(", ");
  told.textContent = usual;
  let chosen = -1, mark = () => {};
  const choose = index => {
    chosen = Math.max(0, Math.min(xs.length - 1, index));
    const found = kept.map(each => [each, each.points.find(([x]) => x === xs[chosen])]).filter(([, point]) => point);
    told.textContent = `${xTitle} ${counted(xs[chosen])}: ` + found.slice(0, 6).map(([each, point]) => `${each.name} ${yText(point[1], 2)}`).join(", ");
    mark(found);
  };
  const place = responsive(width => {
    const height = 220, left = 50, right = 10, top = 8, bottom = 34;
    const [firstX, lastX] = xs.length > 1 ? [xs[0], xs.at(-1)] : [xs[0] - 1, xs[0] + 1];
    const px = x => left + (x - firstX) / (lastX - firstX) * (width - left - right);
    const py = y => top + (high - y) / (high - low) * (height - top - bottom);
    const svg = drawn("svg", {viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true"});
    for (const tick of ticksOf(low, high)) {
      svg.append(line(left, py(tick), width - right, py(tick), "grid"),
        textAt(left - 6, py(tick) + 4, form === "share" ? +(100 * tick).toPrecision(4) + "%" : tickText(tick), {"text-anchor": "end"}));
    }
    for (const tick of ticksOf(firstX, lastX, Math.max(2, Math.min(6, width / 80))).filter(Number.isInteger)) {
      if (xs.length > 1 || tick === xs[0]) svg.append(textAt(px(tick), height - bottom + 16, tickText(tick), {"text-anchor": "middle"}));
    }
    svg.append(textAt((left + width - right) / 2, height - 3, xTitle, {"text-anchor": "middle", class: "axis"}), line(left, height - bottom, width - right, height - bottom, "base"));
    for (const each of kept) {
      svg.append(drawn("polyline", {points: each.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" "), class: "line " + each.style}));
      if (each.points.length <= 30) svg.append(...each.points.map(([x, y]) => drawn("circle", {cx: px(x), cy: py(y), r: each.points.length === 1 ? 4 : 2.5, class: "dot " + each.style})));
    }
    const marks = drawn("g");
    svg.append(marks);
    mark = found => marks.replaceChildren(line(px(xs[chosen]), top, px(xs[chosen]), height - bottom, "cursor"),
      ...found.map(([each, [x, y]]) => drawn("circle", {cx: px(x), cy: py(y), r: 5, class: "dot " + each.style})));
    svg.addEventListener("pointermove", event => {
      const x = firstX + (event.offsetX * width / svg.clientWidth - left) / (width - left - right) * (lastX - firstX);
      choose(xs.reduce((best, value, index) => Math.abs(value - x) < Math.abs(xs[best] - x) ? index : best, 0));
    });
    svg.addEventListener("pointerleave", () => { marks.replaceChildren(); told.textContent = usual; chosen = -1; });
    return svg;
  });
  labelled(place, `${title}. Arrow keys go through the values.`, "application");
  place.tabIndex = 0;
  place.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (step) { choose(chosen < 0 ? (step > 0 ? 0 : xs.length - 1) : chosen + step); event.preventDefault(); }
  });
  const names = kept.filter(each => each.name && !each.isUnnamed);
  return make("figure", {className: "plot"}, make("figcaption", {}, make("b", {textContent: title}), ...(names.length > 1 || names.some(each => each.isNamed)
    ? names.map(each => make("span", {className: "key " + each.style, textContent: each.name})) : [])), place, told);
}

/** Values with intervals beside each other on one scale. rows: {name, value, low, high, dots: [value, …], style}. */
function intervalChart({label, rows, text, width: nameShare = 0.3, zero = false}) {
  const values = rows.flatMap(row => [row.value, row.low, row.high, ...(row.dots ?? [])]).filter(value => value !== null && value !== undefined);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (zero) [low, high] = [Math.min(0, low), Math.max(0, high)];
  const pad = (high - low) * 0.08 || Math.abs(high) * 0.02 || 0.01;
  [low, high] = [low - pad, high + pad];
  const place = responsive(width => {
    const left = rows.some(row => row.name) ? Math.min(190, Math.round(width * nameShare)) : 8, right = 12, step = 34, height = step * rows.length + 26;
    const px = value => left + (value - low) / (high - low) * (width - left - right);
    const svg = drawn("svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label});
    for (const tick of ticksOf(low, high, Math.max(3, (width - left) / 90))) {
      svg.append(line(px(tick), 4, px(tick), height - 22, "grid"), textAt(px(tick), height - 6, text(tick, true), {"text-anchor": "middle"}));
    }
    if (zero) svg.append(line(px(0), 4, px(0), height - 22, "base"));
    rows.forEach((row, index) => {
      const y = step * index + step / 2 + 2, told = `${row.name ? row.name + ": " : ""}${text(row.value)}${row.low === null ? "" : `, ${text(row.low)} to ${text(row.high)}`}`;
      const group = drawn("g", {class: row.style ?? "series-1"}, drawn("title", {}, told));
      if (row.name) {
        const most = Math.floor((left - 10) / 7);
        svg.append(textAt(left - 8, y + 4, row.name.length > most ? row.name.slice(0, most - 1) + "…" : row.name, {"text-anchor": "end", class: "name"}));
      }
      if (row.low !== null && row.low !== undefined) group.append(drawn("rect", {x: px(row.low), y: y - 7, width: Math.max(1, px(row.high) - px(row.low)), height: 14, rx: 3, class: "band"}));
      for (const dot of row.dots ?? []) group.append(drawn("circle", {cx: px(dot), cy: y, r: 4, class: "ring"}, drawn("title", {}, text(dot))));
      group.append(line(px(row.value), y - 10, px(row.value), y + 10, "mean"));
      svg.append(group);
    });
    return svg;
  });
  return place;
}

/** A share and its interval on a line from `from` to 1, in a cell of a table. */
function miniature(from, low, value, high) {
  const x = share => 1 + 98 * (share - from) / (1 - from);
  return drawn("svg", {viewBox: "0 0 100 14", class: "miniature", preserveAspectRatio: "none", "aria-hidden": "true"}, line(2, 7, 98, 7, "grid"),
    drawn("rect", {x: x(low), y: 3, width: Math.max(1, x(high) - x(low)), height: 8, rx: 2, class: "band series-1"}), line(x(value), 1, x(value), 13, "mean series-1"));
}
