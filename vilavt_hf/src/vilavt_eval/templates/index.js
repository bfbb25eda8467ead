"use strict";
(() => {
  const text = document.getElementById("text");
  const count = document.getElementById("count");
  const choices = ["change", "verdict", "finish", "turns", "category"]
    .map((name) => [name, document.getElementById(name)])
    .filter(([, select]) => select);
  const rows = Array.from(document.querySelectorAll(".list li"), (row) => ({
    row,
    words: `${row.textContent} ${row.dataset.searched}`.toLowerCase(),
  }));
  const fits = (row, name, value) =>
    !value || (name === "finish" ? row.dataset.finish.split(" ").includes(value) : row.dataset[name] === value);

  const filter = () => {
    const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, words } of rows) {
      const show =
        wanted.every((word) => words.includes(word)) && choices.every(([name, select]) => fits(row, name, select.value));
      row.hidden = !show;
      shown += show;
    }
    count.textContent = `${shown} shown`;
  };

  let waiting = 0;
  text.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  for (const [, select] of choices) select.addEventListener("change", filter);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, select")) {
      event.preventDefault();
      text.focus();
    }
  });
  filter(); // a browser that goes back keeps what was typed
})();
