"use strict";
const cards = [...document.querySelectorAll(".cards li")];
const buttons = [...document.querySelectorAll("button[data-kind]")];
const chosen = document.getElementById("class-filter");
const shown = document.getElementById("shown");
function filter() {
  const pressed = buttons.find((button) => button.getAttribute("aria-pressed") === "true");
  const kind = pressed ? pressed.dataset.kind : "all";
  let count = 0;
  for (const card of cards) {
    const fits = (kind === "all" || card.dataset.kind === kind) && (!chosen.value || card.dataset.label === chosen.value);
    card.hidden = !fits;
    count += fits ? 1 : 0;
  }
  shown.textContent = count + " shown";
}
for (const button of buttons) {
  button.addEventListener("click", () => {
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    filter();
  });
}
if (chosen) chosen.addEventListener("change", filter);
const zoom = document.getElementById("zoom");
function visible() { return cards.filter((card) => !card.hidden); }
let current = null;
function show(card) {
  current = card;
  const image = card.querySelector("img");
  const large = zoom.querySelector("img");
  large.src = image.src; large.alt = image.alt; large.className = image.className;
  zoom.querySelector("p").textContent = card.dataset.text;
  if (!zoom.open) zoom.showModal();
}
function step(by) {
  const list = visible();
  show(list[(list.indexOf(current) + by + list.length) % list.length]);
}
for (const card of cards) card.querySelector("button").addEventListener("click", () => show(card));
if (zoom) {
  zoom.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });
  zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
  zoom.addEventListener("close", () => { if (current) current.querySelector("button").focus(); });
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  document.getElementById("close").addEventListener("click", () => zoom.close());
}
// A cell of the matrix under the pointer, or touched, in words: its headers may be far away.
const matrix = document.querySelector("table.matrix");
const cell = document.getElementById("cell");
function read(event) {
  const place = event.target.closest("tbody td");
  if (!place) return;
  const row = place.parentElement.querySelector("th");
  const column = matrix.querySelectorAll("thead th")[place.cellIndex - 1];
  const isolated = (header) => "\u2068" + header.title + "\u2069";
  cell.textContent = isolated(row) + " answered as " + isolated(column) + ": " + (place.textContent || 0) + " of " + row.dataset.n;
}
for (const name of ["pointerover", "click"]) matrix.addEventListener(name, read);
