// Formulas: Markdown leaves them as text between \( \) or \[ \].
for (const formula of document.querySelectorAll(".arithmatex")) {
  const text = formula.textContent.trim()
  katex.render(text.slice(2, -2), formula, {
    displayMode: text.startsWith("\\["),
    throwOnError: false,
  })
}

// Long names in the headings of the reference and in tables break after dots and underscores.
for (const name of document.querySelectorAll(".doc-heading > .doc-object-name, td code")) {
  name.innerHTML = name.innerHTML.replace(/[._](?![^<]*>)/g, "$&<wbr>")
}

// A flag does not break after its dashes.
for (const code of document.querySelectorAll(":not(pre) > code")) {
  code.innerHTML = code.innerHTML.replace(/(^|\s)(--\w+)/g, '$1<span class="flag">$2</span>')
}

// Tables that are wider than the page are set tighter; if that is not enough, each cell gets a line with the name of
// its column.
const tables = document.querySelectorAll(".md-content table:not(.highlighttable)")
for (const table of tables) {
  const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent)
  for (const row of table.querySelectorAll("tbody tr")) {
    ;[...row.cells].forEach((cell, column) => (cell.dataset.column = names[column] ?? ""))
  }
}

function stack() {
  for (const table of tables) {
    delete table.dataset.tight
    delete table.dataset.stacked
    const room = table.closest(".md-typeset__scrollwrap") ?? table.parentElement
    if (room.scrollWidth > room.clientWidth) table.dataset.tight = ""
    if (room.scrollWidth > room.clientWidth) table.dataset.stacked = ""
  }
}

addEventListener("load", stack)
addEventListener("resize", stack)
