"""Files that a hosting service reads: they parse, and name what exists."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from dnw_graph import __version__

ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_yaml_parses(path):
    content = yaml.safe_load(path.read_text())
    if path.parent.name == "ISSUE_TEMPLATE":
        assert {"name", "description", "body"} <= content.keys()
        ids = [field["id"] for field in content["body"]]
        assert len(set(ids)) == len(ids)


def test_the_workflow_runs_targets_and_tests_that_exist():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"run: make (.*)", text):
        assert set(command.split()) <= set(targets)
    for path in re.findall(r"\btests/\S+", text):
        assert (ROOT / path).exists(), path
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = yaml.safe_load(text)["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert ">=" + versions[0] == project["requires-python"]


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert __version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.fixture
def setup_file():
    spec = importlib.util.spec_from_file_location("dnw_graph_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_urls_lead_to_a_site_that_is_published(setup_file):
    assert list(setup_file.urls("")) == ["Paper", "Original code"]
    urls = setup_file.urls("https://example.org/dnw/")
    assert urls["Documentation"] == "https://example.org/dnw/"
    assert urls["Changelog"] == "https://example.org/dnw/changelog.html"
    assert (ROOT / "docs" / "changelog.md").is_file()


def test_links_of_the_readme_hold_on_an_index(setup_file):
    for_index = setup_file.for_index
    text = (ROOT / "README.md").read_text()
    for site in ("", "https://example.org/dnw/"):
        links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", for_index(text, site))
        pages = ["".join(pair) for pair in links]
        assert all(page.startswith("https://") for page in pages)
        assert bool(site) == any(page.startswith(site or "no site") for page in pages)
        for page in pages if site else ():
            if page.startswith(site):
                path = re.sub(r"[.]html(#.*)?$", ".md", page.removeprefix(site))
                assert (ROOT / "docs" / path).is_file(), page
    plain = for_index(text, "")
    assert "The gallery has more." in plain
    assert "docs/" not in re.sub(r"```.*?```", "", plain, flags=re.DOTALL).replace("The pages are in docs/;", "")


def test_the_readme_says_of_its_animation_what_the_gallery_says():
    said = [(ROOT / name).read_text() for name in ("README.md", "docs/gallery.md")]
    for pattern in (r"(\d+)(?: edges)? are born on the\s+way", r"(\d+) nodes are dead", r"graph of (\d+) nodes"):
        readme, gallery = (re.search(pattern, text).group(1) for text in said)
        assert readme == gallery
    assert (ROOT / "docs" / "images" / "learning.gif").stat().st_size < 1_500_000
