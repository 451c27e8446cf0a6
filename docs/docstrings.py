"""Griffe extension: turns the Sphinx roles and the formulas of docstrings into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
FORMULA = re.compile(r":math:`([^`]*)`|\.\. math:: (.*)")

SYMBOLS = {
    ",": "\u2009",
    "Big": "",
    "Delta": "Δ",
    "alpha": "α",
    "cos": "cos",
    "dot Z": "Ż",
    "dots": "…",
    "ell": "ℓ",
    "gamma": "γ",
    "in": "∈",
    "lambda": "λ",
    "langle": "⟨",
    "left": "",
    "lfloor": "⌊",
    "min": "min",
    "partial": "∂",
    "pi": "π",
    "qquad": "\u2003",
    "rangle": "⟩",
    "rfloor": "⌋",
    "right": "",
    "setminus": "∖",
    "sigma": "σ",
    "sum": "Σ",
    "theta": "θ",
    "zeta": "ζ",
    "|": "‖",
}
# Commands with arguments, and how they read in one line.
WRITTEN = {
    r"\\t?frac\{([^{}]*)\}\{([^{}]*)\}": lambda found: f"{_part(found[1])}/{_part(found[2])}",
    r"([_^])\\text\{([^{}]*)\}": lambda found: _shifted(found[1], found[2]),
    r"\\(?:mathrm|text)\{([^{}]*)\}": r"\1",
    r"([_^])\{([^{}]*)\}": lambda found: _shifted(found[1], found[2]),
}


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            text = FORMULA.sub(lambda found: formula(found[1] or found[2]), obj.docstring.value)
            obj.docstring.value = ROLE.sub(link, text)


def link(role: re.Match[str]) -> str:
    """Return a cross-reference to something in this package, or code for anything else."""
    kind, short, path = role.groups()
    title = path.rsplit(".", 1)[-1] if short else path
    if kind == "mod":  # not every module has a page
        return f'<autoref identifier="{path}" optional><code>{title}</code></autoref>'
    return f"`{title}`" if path.startswith("torch") else f"[`{title}`][{path}]"


def formula(tex: str) -> str:
    """Return a formula as HTML.

    Raises:
        ValueError: If it has a command that :data:`SYMBOLS` lacks.
    """
    for name, symbol in SYMBOLS.items():
        tex = re.sub(rf"\\{re.escape(name)}(?![a-zA-Z])" if name.isalpha() else rf"\\{re.escape(name)}", symbol, tex)
    tex = re.sub("([∂Δ]) ", r"\1", tex)
    before = ""
    while before != tex:  # from the innermost braces outwards
        before = tex
        for pattern, written in WRITTEN.items():
            tex = re.sub(pattern, written, tex)
    tex = re.sub(r"([_^])(\w)", lambda found: _shifted(found[1], found[2]), tex)
    if "\\" in tex:
        raise ValueError(f"add the command of this formula to docs/docstrings.py: {tex}")
    return f'<span class="formula">{tex}</span>'


def _part(tex: str) -> str:
    """Return the upper or lower part of a fraction, in brackets unless it is one symbol."""
    return tex if re.fullmatch(r"∂?\w+(<su[bp]>[^<]*</su[bp]>)?", tex.strip()) else f"({tex})"


def _shifted(sign: str, tex: str) -> str:
    tag = "sub" if sign == "_" else "sup"
    return f"<{tag}>{tex}</{tag}>"
