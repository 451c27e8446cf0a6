// Formulas: Markdown leaves them as text between \( \) or \[ \].
for (const formula of document.querySelectorAll(".arithmatex")) {
  const text = formula.textContent.trim()
  katex.render(text.slice(2, -2), formula, {
    displayMode: text.startsWith("\\["),
    throwOnError: false,
  })
}

// Tables that are wider than the page: one line per cell, with the name of its column.
const tables = document.querySelectorAll(".md-content table:not(.highlighttable)")
for (const table of tables) {
  const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent)
  for (const row of table.querySelectorAll("tbody tr")) {
    ;[...row.cells].forEach((cell, column) => (cell.dataset.column = names[column] ?? ""))
  }
}

function stack() {
  for (const table of tables) {
    table.classList.remove("stacked")
    const room = table.closest(".md-content__inner").clientWidth
    table.classList.toggle("stacked", table.scrollWidth > room)
  }
}

stack()
addEventListener("resize", stack)
document.fonts?.ready.then(stack)
