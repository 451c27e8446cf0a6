"""Builds the site: its pages, the source code that they link to, and the tutorials as notebooks."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from os.path import relpath
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"
DIRECTORIES = ("dnw_graph", "tests", "examples", "benchmarks")
LINK = re.compile(rf'href="(?:\.\./)*((?:{"|".join(DIRECTORIES)})/[\w./-]+)\.py(?:#([\w.]+))?"')
SOURCE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style} body {{ margin: 1em }} pre {{ white-space: pre-wrap }} :target {{ background: #fff3b0 }}</style>
</head><body><h1>{title}</h1>{code}</body></html>
"""


def lines(path: Path) -> dict[str, int]:
    """Return the line of every class, function, method and module-level name of a file, by its dotted name."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update({prefix + name.id: child.lineno for name in targets if isinstance(name, ast.Name)})

    visit(ast.parse(path.read_text()), "")
    return found


def write_sources() -> None:
    """Write a page for every Python file of the repository, with an anchor per line."""
    formatter = HtmlFormatter(linenos="inline", anchorlinenos=True, lineanchors="L")
    style = formatter.get_style_defs()
    for directory in DIRECTORIES:
        for path in (ROOT / directory).rglob("*.py"):
            name = path.relative_to(ROOT)
            page = SITE / "source" / name.with_suffix(".html")
            page.parent.mkdir(parents=True, exist_ok=True)
            code = re.sub(r'id="L-(\d+)"', r'id="L\1"', highlight(path.read_text(), PythonLexer(), formatter))
            page.write_text(SOURCE.format(title=name, style=style, code=code.replace('href="#L-', 'href="#L')))


def link_sources() -> None:
    """Make links to Python files of the repository lead to those pages."""
    for page in SITE.rglob("*.html"):
        if SITE / "source" in page.parents:
            continue

        def target(link: re.Match[str], page: Path = page) -> str:
            path, name = link.groups()
            line = f"#L{lines(ROOT / f'{path}.py')[name]}" if name else ""
            return f'href="{relpath(SITE / "source" / path, page.parent)}.html{line}"'

        page.write_text(LINK.sub(target, page.read_text()))


def notebook(page: str) -> dict[str, object]:
    """Return a page in Markdown as a Jupyter notebook: its Python blocks become cells of code."""
    cells = []
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)):
        cell: dict[str, object] = {"id": str(number), "metadata": {}, "source": part.strip().splitlines(keepends=True)}
        if number % 2:
            cells.append(cell | {"cell_type": "code", "execution_count": None, "outputs": []})
        elif part.strip():
            cells.append(cell | {"cell_type": "markdown"})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def write_notebooks() -> None:
    """Write every tutorial as a notebook beside its page."""
    for page in (ROOT / "docs" / "tutorials").glob("*.md"):
        (SITE / "tutorials" / f"{page.stem}.ipynb").write_text(json.dumps(notebook(page.read_text()), indent=1))


def publish(site: Path, directory: Path, version: str) -> None:
    """Put a site beside those of other versions, add it to the version menu, and redirect the root to it."""
    listed = directory / "versions.json"
    versions = json.loads(listed.read_text()) if listed.exists() else []
    others = [entry | {"aliases": []} for entry in versions if entry["version"] != version]
    shutil.copytree(site, directory / version, dirs_exist_ok=True)
    listed.write_text(json.dumps([{"version": version, "title": version, "aliases": ["latest"]}, *others]))
    (directory / "index.html").write_text(f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={version}/">')


def main() -> None:
    """Build the site into ``site/``; the sitemap names its pages by the environment variable ``SITE_URL``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--publish", type=Path, metavar="DIRECTORY", help="copy the site beside those of other versions"
    )
    options = parser.parse_args()
    if importlib.util.find_spec("zensical") is None:
        sys.exit("Zensical is not installed: make docs installs it, as does pip install -e '.[dev]'")
    if subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT).returncode:
        sys.exit("fix the pages above")
    write_sources()
    link_sources()
    write_notebooks()
    if options.publish:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        publish(SITE, options.publish, project["version"])


if __name__ == "__main__":
    main()
