"""Griffe extension: roles of docstrings become links, objects get their source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
ROOT = Path(__file__).parent.parent


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = source(obj) + markdown(obj.docstring.value)


def markdown(text: str) -> str:
    r"""Return a docstring with links for roles and for papers, and with \( \), \[ \] around formulas."""
    text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
    text = re.sub(r"^\.\. math:: (.*)", r"\\[\1\\]", text, flags=re.MULTILINE)
    text = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return ROLE.sub(link, text)


def link(role: re.Match[str]) -> str:
    """Return a cross-reference within the package, or code for anything else."""
    kind, short, path = role.groups()
    title = path.rsplit(".", 1)[-1] if short else path
    if kind == "mod":  # not every module has a page
        title = f"<code>{title}</code>"
        return f'<autoref identifier="{path}" optional>{title}</autoref>'
    return f"`{title}`" if path.startswith("torch") else f"[`{title}`][{path}]"


def source(obj: griffe.Object) -> str:
    """Return a link from the reference to the line that defines an object."""
    if obj.kind is griffe.Kind.ATTRIBUTE or not isinstance(obj.filepath, Path):
        return ""
    page = obj.filepath.relative_to(ROOT).with_suffix(".html").as_posix()
    href = f"../source/{page}#L{obj.lineno or 1}"
    return f'<a class="source" href="{href}">source</a>'
