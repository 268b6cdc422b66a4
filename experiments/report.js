// The table of all strategies sorts by a click on a heading; the filter hides strategies, and texts that none of the others wrote.
"use strict";
const body = document.querySelector(".all tbody");
const rows = [...body.rows];
const cards = [...document.querySelectorAll(".cards li")];
const filter = document.querySelector("#filter");

function sort(heading, column) {
  const falling = heading.ariaSort !== "descending";
  for (const other of document.querySelectorAll(".all thead th")) other.removeAttribute("aria-sort");
  heading.ariaSort = falling ? "descending" : "ascending";
  const value = (row) => parseFloat(row.cells[column].dataset.value); // NaN where there is no figure
  const order = (a, b) =>
    column === 0 ? rows.indexOf(a) - rows.indexOf(b) : (value(a) - value(b) || rows.indexOf(a) - rows.indexOf(b));
  const known = rows.filter((row) => column === 0 || !Number.isNaN(value(row))).sort(order);
  if (falling !== (column === 0)) known.reverse();
  body.append(...known, ...rows.filter((row) => !known.includes(row)));
}

document.querySelectorAll(".all thead th").forEach((heading, column) => {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  button.addEventListener("click", () => sort(heading, column));
  heading.append(button);
});

filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/);
  const fits = (text) => words.every((word) => text.toLowerCase().includes(word));
  for (const row of rows) row.hidden = !fits(row.cells[0].textContent);
  for (const card of cards) card.hidden = ![...card.querySelectorAll("h4 span")].some((each) => fits(each.textContent));
});
filter.parentElement.hidden = false;
