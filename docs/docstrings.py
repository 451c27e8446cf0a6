"""Griffe extension: turns the Sphinx roles and the formulas of docstrings into Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
FORMULA = re.compile(r":math:`([^`]*)`|\.\. math:: (.*)")

SYMBOLS = {
    "Big": "",
    "dot Z": "Ż",
    "ell": "ℓ",
    "gamma": "γ",
    "in": "∈",
    "lambda": "λ",
    "langle": "⟨",
    "partial": "∂",
    "qquad": "\u2003",
    "rangle": "⟩",
    "sum": "Σ",
    "theta": "θ",
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
        tex = re.sub(rf"\\{name}(?![a-zA-Z])", symbol, tex)
    if "\\" in tex:
        raise ValueError(f"add the command of this formula to docs/docstrings.py: {tex}")
    tex = re.sub(r"_(\w)", r"<sub>\1</sub>", tex)
    while (nested := re.sub(r"_\{([^{}]*)\}", r"<sub>\1</sub>", tex)) != tex:
        tex = nested
    return f'<span class="formula">{tex}</span>'
