// A table that is sorted by its headings and searched by a field; of many rows the first are shown.
"use strict";

const ROWS_AT_FIRST = 200;

/**
 * columns: {title, value: row => number | string | null, cell: row => string | node, narrow: kept on small screens}; the first
 * names the row. `order`: {by: index of a column, sign}; null keeps the order of the rows.
 */
function sortableTable({id, label, columns, rows, noun, order = null, searched = null}) {
  let shown = ROWS_AT_FIRST;
  const search = make("input", {type: "search", id: id + "-search", autocomplete: "off", spellcheck: false});
  const told = make("p", {className: "soft", id: id + "-count"});
  told.setAttribute("role", "status");
  const more = make("button", {type: "button", className: "button", onclick: () => { shown = Infinity; fill(); }});
  const body = make("tbody");
  const headings = columns.map((column, index) => {
    const button = make("button", {type: "button", textContent: column.title, onclick: () => {
      // Numbers begin with the lowest: what is worst is looked for.
      order = {by: index, sign: order?.by === index ? -order.sign : 1};
      fill();
    }});
    return make("th", {scope: "col", className: styleOf(column, index)}, button);
  });

  function styleOf(column, index) { return (index ? "figure" : "") + (index && !column.narrow ? " wide" : ""); }

  function ordered(found) {
    if (order === null) return found;
    const {value} = columns[order.by], isMissing = row => value(row) === null;
    const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", {numeric: true}) : a - b;
    return [...found].sort((a, b) => isMissing(a) - isMissing(b) || (isMissing(a) ? 0 : order.sign * compare(value(a), value(b))));
  }

  function fill() {
    const sought = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = searched ? rows.filter(row => sought.every(word => searched(row).toLowerCase().includes(word))) : rows;
    headings.forEach((heading, index) => {
      if (order?.by === index) heading.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      else heading.removeAttribute("aria-sort");
    });
    body.replaceChildren(...ordered(found).slice(0, shown).map(row => make("tr", {}, ...columns.map((column, index) => {
      const cell = make(index ? "td" : "th", {className: styleOf(column, index)}, column.cell(row));
      if (!index) cell.scope = "row";
      if (column.bar) {
        cell.classList.add("bar");
        cell.style.setProperty("--share", column.value(row) ?? 0);
      }
      return cell;
    }))));
    told.textContent = found.length === rows.length ? plural(rows.length, noun) : `${counted(found.length)} of ${plural(rows.length, noun)}`;
    more.hidden = found.length <= shown;
    more.textContent = `Show all ${counted(found.length)}`;
  }
  search.oninput = fill;
  fill();
  const table = make("table", {id}, make("thead", {}, make("tr", {}, ...headings)), body);
  const scroll = labelled(make("div", {className: "scroll tall", tabIndex: 0}, labelled(table, label)), label, "region");
  const tools = searched ? make("div", {className: "tools"}, make("label", {}, `Search the ${noun}${/s$/.test(noun) ? "es" : "s"} `, search), told) : told;
  return make("div", {className: "stack"}, tools, scroll, more);
}
