// Formulas: Markdown leaves them as text between \( \) or \[ \].
for (const formula of document.querySelectorAll(".arithmatex")) {
  const text = formula.textContent.trim()
  katex.render(text.slice(2, -2), formula, {
    displayMode: text.startsWith("\\["),
    throwOnError: false,
  })
}

// Long names in the headings of the reference break after dots and underscores.
for (const name of document.querySelectorAll(".doc-heading > .doc-object-name")) {
  name.innerHTML = name.innerHTML.replace(/[._]/g, "$&<wbr>")
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
    delete table.dataset.stacked
    const room = table.closest(".md-typeset__scrollwrap") ?? table.parentElement
    if (room.scrollWidth > room.clientWidth) table.dataset.stacked = ""
  }
}

addEventListener("load", stack)
addEventListener("resize", stack)
