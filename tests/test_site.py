"""The built site: links lead somewhere, and a headless Chromium sees nothing that is cut, empty or unrendered."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import check_docs as check
import draw_method
import pytest
from build_docs import notebook, publish

ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"

pytestmark = pytest.mark.slow


def broken_links(site):
    """Links of pages, to files or anchors of the site, that lead nowhere, and what a page loads from elsewhere."""
    texts = {page: page.read_text() for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for page, text in texts.items()}
    for page in check.pages(site):
        for resource in re.findall(r"<(?:script|link|img)\b[^>]*https?://[^>]*", texts[page]):
            if 'rel="canonical"' not in resource:
                yield f"{page.name}: {resource}"
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', texts[page]):
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if "://" in link or (anchor.startswith("__") and target in texts):
                continue
            if not target.exists() or (anchor and anchor not in anchors[target]):
                yield f"{page.name}: {link}"


def test_links_lead_somewhere_and_nothing_is_cut_empty_or_unrendered():
    pytest.importorskip("zensical", reason="Zensical is not installed")
    subprocess.run([sys.executable, ROOT / "tools" / "build_docs.py"], check=True, stdout=subprocess.DEVNULL)
    assert not list(broken_links(SITE))
    program = check.find_browser()
    if program is None:
        pytest.skip("no Chromium")
    with check.Browser(program) as browser:
        for page in check.pages(SITE):
            browser.open(page)
            for width in check.WIDTHS:
                browser.resize(width)
                assert not browser.look(), f"{page.relative_to(SITE)} at {width} px"


def test_the_check_sees_what_is_wrong(tmp_path):
    program = check.find_browser()
    if program is None:
        pytest.skip("no Chromium")
    page = tmp_path / "page.html"
    with check.Browser(program) as browser:

        def found(body):
            page.write_text(f"<!DOCTYPE html><article>{body}</article>")
            browser.open(page)
            browser.resize(390)
            return [what for what, _ in browser.look()]

        assert found("<pre>short</pre><table><tr><td>1</table>") == []
        assert found(f"<pre style='overflow: auto'>{'long ' * 99}</pre>") == ["cut"]
        assert found("<table><tr><td>1<td></table>") == ["empty cell"]
        assert found("<p>A weight.</p><p>&gt;&gt;&gt; print(1)</p>") == ["unrendered"]
        assert found("<p>the :class:`Graph`</p>") == ["unrendered"]
        assert found("<span class=arithmatex>\\(x\\)</span>") == ["unrendered", "unrendered"]
        assert found("<img src='missing.png' width=9>") == ["image"]


def test_a_published_version_stands_beside_the_others(tmp_path):
    site, public = tmp_path / "site", tmp_path / "public"
    site.mkdir()
    (site / "index.html").write_text("pages")
    for version in ("0.1.0", "0.2.0", "0.2.0"):
        publish(site, public, version)
    versions = json.loads((public / "versions.json").read_text())
    assert [(entry["version"], entry["aliases"]) for entry in versions] == [("0.2.0", ["latest"]), ("0.1.0", [])]
    assert all((public / entry["version"] / "index.html").exists() for entry in versions)
    assert "url=0.2.0/" in (public / "index.html").read_text()


def test_the_method_is_drawn_from_a_step_that_swaps_one_edge(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(draw_method, "DIRECTORY", tmp_path)
    monkeypatch.setattr(
        draw_method, "between", lambda ax, ends, **looks: drawn.setdefault(ax, []).append(looks["color"])
    )
    draw_method.main()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs/images").glob("method-*")}
    forward, backward, after = drawn.values()
    assert len(forward) == 15  # candidates
    assert forward.count(draw_method.REAL) == after.count(draw_method.REAL) + 1 == 6
    assert backward.count(draw_method.GRADIENT) == 15
    assert after.count(draw_method.NEW) == after.count(draw_method.HALLUCINATED) == 1


def test_notebooks_have_the_code_of_their_pages():
    page = "# Title\n\nText.\n\n```python\nx = 1\n\ny = x\n```\n\nMore.\n\n```bash\nls\n```\n"
    cells = notebook(page)["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown"]
    assert "".join(cells[1]["source"]) == "x = 1\n\ny = x"
    assert json.dumps(cells)
