// The confusion matrix on a canvas: of two classes or of thousands, looked into by mouse, touch and keyboard.
"use strict";

const MAX_SIDE = 720, MAX_CELL = 110, MIN_CELLS = 4, NAMES_FROM = 13, NUMBERS_FROM = 30, PAIRS = 50;

/** The counts that are not 0, by row: columns[k], counts[k] for k from starts[row] to starts[row + 1]. */
function unpacked(rows) {
  const starts = [0], columns = [], counts = [], predicted = new Float64Array(rows.length), support = new Float64Array(rows.length);
  rows.forEach((row, label) => {
    let column = -1;
    for (let i = 0; i < row.length; i += 2) {
      column += row[i];
      columns.push(column);
      counts.push(row[i + 1]);
      support[label] += row[i + 1];
      predicted[column] += row[i + 1];
    }
    starts.push(columns.length);
  });
  const at = (row, column) => {
    for (let k = starts[row]; k < starts[row + 1]; k++) if (columns[k] === column) return counts[k];
    return 0;
  };
  return {size: rows.length, starts, columns, counts, support, predicted, at, highest: counts.reduce((a, b) => Math.max(a, b), 1)};
}

/** The most frequent mistakes, [true label, predicted label, count]. */
function confusedPairs(matrix, most) {
  const {size, starts, columns, counts} = matrix;
  const mistakes = row => { const found = []; for (let k = starts[row]; k < starts[row + 1]; k++) if (columns[k] !== row) found.push(k); return found; };
  const rows = Array.from({length: size}, (_, row) => mistakes(row));
  // Of a million cells only those that may be among the first become pairs.
  const sorted = Float64Array.from(rows.flat(), k => counts[k]).sort(), least = sorted[Math.max(0, sorted.length - most)];
  return rows.flatMap((found, row) => found.filter(k => counts[k] >= least).map(k => [row, columns[k], counts[k]]))
    .sort((a, b) => b[2] - a[2] || a[0] - b[0] || a[1] - b[1]).slice(0, most);
}

const rgbOf = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));

function showMatrix(names) {
  const matrix = unpacked(report.metrics.confusion), {size} = matrix;
  const canvas = labelled(make("canvas", {tabIndex: 0, id: "matrix"}),
    `Confusion matrix of ${plural(size, "class")}: true classes in rows, predicted ones in columns. Arrow keys move, plus and minus zoom, 0 shows all.`, "application");
  const told = make("p", {className: "readout", id: "cell"});
  told.setAttribute("aria-live", "polite");
  const shares = make("select", {id: "shares"}, ...[["row", "shares of the true class"], ["column", "shares of the predicted class"], ["count", "counts"]]
    .map(([value, textContent]) => make("option", {value, textContent})));
  const hint = size > 20 ? "Point at a cell, or use the arrow keys; zoom with + and −, drag to move." : "Point at a cell, or use the arrow keys.";
  let view = {row: 0, column: 0, cells: size}, cursor = null, side = 0, left = 0, top = 0, width = 0;

  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const cellSize = () => side / view.cells;
  const shareOf = (row, column, count) => shares.value === "row" ? count / matrix.support[row] : shares.value === "column"
    ? count / matrix.predicted[column] : Math.log1p(count) / Math.log1p(matrix.highest);

  function layOut() {
    width = Math.floor(canvas.parentElement.clientWidth);
    if (!width) return;
    const pen = canvas.getContext("2d");
    pen.font = fontOf(12);
    const longest = Math.max(...names.slice(0, 400).map(name => pen.measureText(short(name)).width));
    const room = size > 2 * MAX_SIDE / NAMES_FROM ? Math.min(0.22 * width, 110) : Math.min(0.3 * width, longest + 12);
    left = Math.round(room) + 18;
    side = Math.min(width - left - 2, MAX_SIDE, Math.max(2, size) * MAX_CELL);
    top = 18 + Math.round(isUpright(pen) ? 18 : size > 40 ? Math.min(room, 110) : room);
    const scale = devicePixelRatio || 1;
    canvas.style.width = left + side + 2 + "px";
    canvas.style.height = top + side + 2 + "px";
    canvas.width = Math.round((left + side + 2) * scale);
    canvas.height = Math.round((top + side + 2) * scale);
    draw();
  }
  const fontOf = pixels => `${pixels}px system-ui, sans-serif`;
  const short = name => name.length > 24 ? name.slice(0, 23) + "…" : name;
  const isUpright = pen => size * Math.max(...names.slice(0, 30).map(name => pen.measureText(short(name)).width + 10)) < side;

  function draw() {
    if (!side) return;
    const scale = devicePixelRatio || 1, pen = canvas.getContext("2d"), step = cellSize();
    const [ground, right, wrong] = ["--card", "--right", "--wrong"].map(name => rgbOf(token(name)));
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const pixels = Math.round(side * scale), picture = pen.createImageData(pixels, pixels), data = picture.data, strength = new Float32Array(pixels * pixels);
    for (let i = 0; i < data.length; i += 4) { data[i] = ground[0]; data[i + 1] = ground[1]; data[i + 2] = ground[2]; data[i + 3] = 255; }
    const faintest = step < 4 ? 0.3 : 0.12;  // of small cells the faint ones are hardly seen
    const edge = position => clamp(Math.round(position * step * scale), 0, pixels);
    for (let row = Math.floor(view.row); row < Math.min(size, view.row + view.cells); row++) {
      const y0 = edge(row - view.row), y1 = Math.max(y0 + 1, edge(row + 1 - view.row));
      for (let k = matrix.starts[row]; k < matrix.starts[row + 1]; k++) {
        const column = matrix.columns[k];
        if (column < Math.floor(view.column) || column >= view.column + view.cells) continue;
        // Small shares are what one looks for: the square root makes 1 % visible beside 90 %.
        const share = faintest + (1 - faintest) * Math.sqrt(shareOf(row, column, matrix.counts[k])), hue = row === column ? right : wrong;
        const x0 = edge(column - view.column), x1 = Math.max(x0 + 1, edge(column + 1 - view.column));
        for (let y = y0; y < Math.min(y1, pixels); y++) {
          for (let x = x0; x < Math.min(x1, pixels); x++) {
            // Where cells are smaller than pixels, the strongest is seen.
            if (strength[y * pixels + x] >= share) continue;
            strength[y * pixels + x] = share;
            for (let c = 0; c < 3; c++) data[4 * (y * pixels + x) + c] = ground[c] + share * (hue[c] - ground[c]);
          }
        }
      }
    }
    pen.putImageData(picture, Math.round(left * scale), Math.round(top * scale));
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    drawGrid(pen, step);
    drawNames(pen, step);
    if (step >= NUMBERS_FROM) drawNumbers(pen, step);
    if (cursor) drawCursor(pen, step);
  }

  function drawGrid(pen, step) {
    pen.strokeStyle = token("--line");
    pen.lineWidth = 1;
    pen.strokeRect(left - 0.5, top - 0.5, side + 1, side + 1);
    if (step < 10) return;
    pen.beginPath();
    for (let i = 1; i < view.cells; i++) {
      const at = Math.round((i - view.column % 1) * step), down = Math.round((i - view.row % 1) * step);
      pen.moveTo(left + at + 0.5, top); pen.lineTo(left + at + 0.5, top + side);
      pen.moveTo(left, top + down + 0.5); pen.lineTo(left + side, top + down + 0.5);
    }
    pen.stroke();
  }

  function drawNames(pen, step) {
    pen.fillStyle = token("--soft");
    pen.font = fontOf(12);
    pen.textBaseline = "middle";
    pen.textAlign = "center";
    pen.fillText("predicted class", left + side / 2, 8);
    pen.save();
    pen.translate(8, top + side / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText("true class", 0, 0);
    pen.restore();
    if (step < NAMES_FROM) return;
    pen.fillStyle = token("--ink");
    pen.font = fontOf(Math.min(12, step - 1));
    const fitted = (name, room) => {
      let text = name;
      while (text.length > 1 && pen.measureText(text).width > room) text = text.slice(0, -2).trimEnd() + "…";
      return text;
    };
    const upright = isUpright(pen) && view.cells === size;
    for (let i = 0; i < view.cells; i++) {
      const row = Math.floor(view.row) + i, column = Math.floor(view.column) + i, middle = (i + 0.5) * step;
      pen.textAlign = "right";
      if (row < size) pen.fillText(fitted(names[row], left - 24), left - 6, top + middle);
      if (column >= size) continue;
      if (upright) {
        pen.textAlign = "center";
        pen.fillText(fitted(names[column], step), left + middle, top - 10);
      } else {
        pen.save();
        pen.translate(left + middle, top - 6);
        pen.rotate(-Math.PI / 2);
        pen.textAlign = "left";
        pen.fillText(fitted(names[column], top - 26), 0, 0);
        pen.restore();
      }
    }
  }

  function drawNumbers(pen, step) {
    pen.textAlign = "center";
    const [ground, light] = [token("--card"), token("--ink")];
    for (let row = view.row; row < Math.min(size, view.row + view.cells); row++) {
      for (let k = matrix.starts[row]; k < matrix.starts[row + 1]; k++) {
        const column = matrix.columns[k], count = matrix.counts[k];
        if (column < view.column || column >= view.column + view.cells) continue;
        const share = Math.sqrt(shareOf(row, column, count)), text = counted(count);
        pen.font = fontOf(Math.min(15, Math.max(9, 1.5 * step / Math.max(3, text.length))));
        pen.fillStyle = share > 0.55 ? ground : light;
        pen.fillText(text, left + (column - view.column + 0.5) * step, top + (row - view.row + 0.5) * step);
      }
    }
  }

  function drawCursor(pen, step) {
    const x = left + (cursor.column - view.column) * step, y = top + (cursor.row - view.row) * step, around = Math.max(step, 7), shift = (around - step) / 2;
    if (x < left - 1 || y < top - 1 || x >= left + side || y >= top + side) return;
    pen.strokeStyle = token("--ink");
    pen.lineWidth = 2;
    pen.strokeRect(x - shift, y - shift, around, around);
  }

  function tell(cell) {
    if (!cell) { told.textContent = hint; return; }
    const {row, column} = cell, count = matrix.at(row, column), support = matrix.support[row], predicted = matrix.predicted[column];
    told.replaceChildren(make("b", {textContent: names[row]}), row === column ? ", recognised: " : " taken for ", ...(row === column ? [] : [make("b", {textContent: names[column]}), ": "]),
      `${counted(count)} of ${plural(support, "image")} of the class (${support ? percent(count / support) : NONE}); ${predicted ? percent(count / predicted) : NONE} of ${counted(predicted)} taken for ${row === column ? "it" : "the latter"}`);
  }

  const cellAt = event => {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left - left, y = event.clientY - box.top - top;
    if (x < 0 || y < 0 || x >= side || y >= side) return null;
    const row = Math.floor(view.row + y / cellSize()), column = Math.floor(view.column + x / cellSize());
    return row < size && column < size ? {row, column} : null;
  };
  function look(cells, centre) {
    const now = clamp(Math.round(cells), Math.min(MIN_CELLS, size), size), {row, column} = centre ?? cursor ?? {row: view.row + view.cells / 2, column: view.column + view.cells / 2};
    view = {cells: now, row: clamp(Math.round(row - now / 2), 0, size - now), column: clamp(Math.round(column - now / 2), 0, size - now)};
    draw();
  }
  function move(cell) {
    cursor = {row: clamp(cell.row, 0, size - 1), column: clamp(cell.column, 0, size - 1)};
    const follow = (start, at) => clamp(start, at - view.cells + 1, at);
    view = {...view, row: follow(view.row, cursor.row), column: follow(view.column, cursor.column)};
    tell(cursor);
    draw();
  }
  /** Go to a cell, near enough to read the names. */
  function show(row, column) {
    cursor = {row, column};
    if (size > 40) look(Math.max(MIN_CELLS, Math.floor(side / 32)), cursor); else draw();
    tell(cursor);
    canvas.scrollIntoView({block: "nearest"});
  }

  canvas.addEventListener("keydown", event => {
    const far = event.shiftKey ? 10 : 1, step = {ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far]}[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (step) move(cursor ? {row: cursor.row + step[0], column: cursor.column + step[1]} : {row: view.row, column: view.column});
    else if (event.key === "+" || event.key === "=") look(view.cells / 2);
    else if (event.key === "-") look(view.cells * 2);
    else if (event.key === "0") look(size);
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("focus", () => { if (cursor === null && canvas.matches(":focus-visible")) move({row: 0, column: 0}); });
  let dragged = null;
  canvas.addEventListener("pointerdown", event => { dragged = {x: event.clientX, y: event.clientY, view, moved: false}; });
  canvas.addEventListener("pointermove", event => {
    if (dragged && view.cells < size) {
      const dx = (event.clientX - dragged.x) / cellSize(), dy = (event.clientY - dragged.y) / cellSize();
      if (Math.abs(dx) + Math.abs(dy) >= 1) {
        dragged.moved = true;
        view = {...view, row: clamp(Math.round(dragged.view.row - dy), 0, size - view.cells), column: clamp(Math.round(dragged.view.column - dx), 0, size - view.cells)};
        draw();
      }
    }
    tell(cellAt(event) ?? cursor);
  });
  addEventListener("pointerup", event => {
    if (dragged && !dragged.moved && event.target === canvas && cellAt(event)) move(cellAt(event));
    dragged = null;
  });
  canvas.addEventListener("pointerleave", () => tell(cursor));
  canvas.addEventListener("wheel", event => {
    // Without Ctrl it scrolls the page, as everywhere.
    if (!event.ctrlKey) return;
    event.preventDefault();
    look(view.cells * (event.deltaY > 0 ? 1.3 : 1 / 1.3), cellAt(event));
  }, {passive: false});
  canvas.addEventListener("dblclick", event => { if (cellAt(event)) look(view.cells / 2, cellAt(event)); });
  shares.onchange = draw;
  onNewColours.push(draw);
  tell(null);

  const button = (textContent, name, onclick) => labelled(make("button", {type: "button", className: "button", textContent, onclick}), name);
  const zoom = size > 20 ? [button("+", "Zoom in", () => look(view.cells / 2)), button("−", "Zoom out", () => look(view.cells * 2)), button("All", "Show all classes", () => look(size))] : [];
  const pairs = confusedPairs(matrix, PAIRS);
  const list = pairs.length ? make("div", {className: "stack"}, make("h3", {textContent: "Most often confused"}), pairsTable(pairs, names, matrix, show))
    : make("p", {className: "soft", textContent: "No example was taken for another class."});
  const frame = make("div", {className: "frame"}, canvas);
  new ResizeObserver(() => { if (frame.clientWidth !== width) layOut(); }).observe(frame);
  const legend = make("p", {className: "legend soft"}, make("span", {className: "swatch right"}), "recognised ", make("span", {className: "swatch wrong"}), "taken for another class; darker or brighter: more");
  section("confusion", "Confusion", make("div", {className: size <= 4 ? "halves" : "wide-and-narrow"},
    make("div", {className: "stack"}, make("div", {className: "tools"}, make("label", {}, "Colours are ", shares), ...zoom), frame, told, legend), list));
}

const pairsTable = (pairs, names, matrix, show) => {
  const rows = pairs.map(([row, column, count]) => {
    const go = make("button", {type: "button", className: "link", onclick: () => show(row, column)}, make("span", {textContent: names[row]}), " → ", make("span", {textContent: names[column]}));
    return [go, counted(count), percent(count / matrix.support[row])];
  });
  return labelled(make("div", {className: "scroll tall", tabIndex: 0}, plainTable(["True → predicted", "Images", "Of the class"], rows, "Most often confused")), "Most often confused", "region");
};
