"use strict";
// Sorts a table by the column whose heading is pressed, the highest first, empty fields last.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      const value = (row) => {
        const cell = row.cells[column];
        const number = cell.dataset.value;
        return number === undefined ? cell.textContent.trim() : number === "" ? null : Number(number);
      };
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "number" ? a - b : b.localeCompare(a);
        return down ? -order : order;
      });
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows.map(([, row]) => row));
    });
  });
}
// Shows the lines that have every word of the filter, and of the kind that is asked for.
const words = document.getElementById("words");
const blind = document.getElementById("blind");
const show = () => {
  const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of document.querySelectorAll("tbody tr")) {
    const text = row.textContent.toLowerCase();
    row.hidden = (blind.checked && row.dataset.kind !== "blind") || !asked.every((word) => text.includes(word));
  }
};
words.addEventListener("input", show);
blind.addEventListener("input", show);
