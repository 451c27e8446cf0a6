"""README and docs: code runs, tables and options agree with the package, links lead somewhere."""

import contextlib
import io
import re
import runpy
import shlex
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from build_docs import lines
from pairs import rest_is_slow

from dnw_graph import attach, sparsify
from dnw_graph.analysis.cost import cost
from dnw_graph.candidates import CandidateEdges
from dnw_graph.models import STAGES, MobileNetV1DNW, edges_at_width

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


def blocks(page, language):
    """Code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def rows(page, columns):
    """Table rows of a page with so many columns, without header and rule."""
    lines = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == columns and "---" not in cells[0]]


def run(page, variables):
    """Run the Python blocks of a page one after the other."""
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), variables)


@pytest.fixture(scope="module")
def getting_started(tmp_path_factory):
    """Folder, printed text and variables of the page, whose trained graph another page goes on with."""
    folder, printed, variables = tmp_path_factory.mktemp("getting_started"), io.StringIO(), {}
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        run(ROOT / "docs" / "getting-started.md", variables)
    return folder, printed.getvalue(), variables


@pytest.mark.slow
def test_getting_started_trains_a_graph_and_draws_it(getting_started):
    folder, printed, _ = getting_started
    accuracy = re.search(r"([\d.]+)% of the last 360 digits", printed)
    assert float(accuracy[1]) > 80
    assert (folder / "wiring.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "name",
    rest_is_slow(
        [
            "README.md",
            *(
                f"docs/{name}.md"
                for name in ("index", "concepts", "extending", "models", "rules", "sparsify", "shipping")
            ),
        ],
        quick=5,
    ),
)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(ROOT / name, {})


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_run(page, tmp_path, monkeypatch):
    if page.stem == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(tmp_path)
    run(page, {})
    plt.close("all")


def test_two_lines_make_a_script_one_with_rigl():
    (diff,) = blocks(ROOT / "README.md", "diff")
    assert blocks(ROOT / "docs" / "rules.md", "diff") == [diff]
    given = {
        "torch": torch,
        "F": torch.nn.functional,
        "resnet18": lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)),
        "loader": [(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))] * 10,
        "attach": attach,
        "sparsify": sparsify,
    }

    def weight(script, epochs):
        torch.manual_seed(0)
        variables = {**given, "epochs": epochs}
        exec("\n".join(line[1:] for line in script), variables)
        return variables["model"][0].weight

    sparse = diff.splitlines()
    plain = [line for line in sparse if not line.startswith("+")]
    assert len(sparse) == len(plain) + 2
    assert weight(plain, 1).all()
    short, long = weight(sparse, 1) != 0, weight(sparse, 30) != 0  # whose rounds follow steps 100 and 200
    assert int(short.sum()) <= 13
    assert (short != long).any()


@pytest.mark.slow
def test_python_blocks_on_looking_at_wirings_run(getting_started, tmp_path, monkeypatch):
    page = ROOT / "docs" / "wirings.md"
    monkeypatch.chdir(tmp_path)
    run(page, dict(getting_started[2]))
    plt.close("all")
    for picture in re.findall(r'"(\w+\.png)"', page.read_text()):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_has_at_most_80_columns(page):
    for code in re.findall(r"^ *```\w+\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in code.splitlines():
            assert len(line) <= 80, line


def test_no_page_with_python_is_left_out():
    tested = {
        "README.md",
        "concepts.md",
        "extending.md",
        "getting-started.md",
        "index.md",
        "models.md",
        "rules.md",
        "shipping.md",
        "sparsify.md",
        "wirings.md",
    }
    assert {page.name for page in PAGES if blocks(page, "python")} == tested | {page.name for page in TUTORIALS}


def test_every_numbered_part_of_the_paper_has_code_and_a_test():
    table = [row for row in rows(ROOT / "docs" / "paper.md", 3) if row[0] != "paper"]
    for what, code, test in table:
        assert "](../" in code, what
        assert re.search(r"\]\(\.\./tests/\S*#(\w+\.)?test_\w+\)", test), what
    found = {kind: set() for kind in ("Equation", "Line", "Table", "Figure")}
    for what, _, _ in table:
        for kind, first, last in re.findall(r"(Equation|Line|Table|Figure)s? (\d+)(?: (?:to|and) (\d+))?", what):
            found[kind] |= set(range(int(first), int(last or first) + 1))
    assert {kind: len(numbers) for kind, numbers in found.items()} == {
        "Equation": 30,
        "Line": 10,
        "Table": 6,
        "Figure": 3,
    }


def test_edges_per_stage_are_those_of_the_model():
    def number(cell):
        return int(cell.replace(",", ""))

    table = rows(ROOT / "docs" / "models.md", 6)[1:]
    assert len(table) == len(STAGES)
    for stage, (_, sizes, _, candidates, weights, edges) in zip(STAGES, table, strict=True):
        assert tuple(number(size) for size in sizes.split(", ")) == stage
        assert number(candidates) == CandidateEdges.static(stage).num_candidates
        assert number(weights) == sum(a * b for a, b in pairwise(stage))
        assert number(edges) == edges_at_width(stage, 0.225)


def test_cost_is_the_sum_of_its_parts():
    table = {part: float(cell.removesuffix(" M")) for part, cell in rows(ROOT / "docs" / "models.md", 2)[1:]}
    sides = (112, 56, 28, 14, 7)
    edges = sum(edges_at_width(stage, 0.225) * side**2 for stage, side in zip(STAGES, sides, strict=True))
    # Every node but the outputs has a 3×3 convolution, whose result has the size of its stage.
    nodes = sum(sum(stage[:-1]) * 9 * side**2 for stage, side in zip(STAGES, sides, strict=True))
    stem, classifier = 32 * 27 * 112**2, 1024 * 1000
    assert list(table.values()) == [
        round(count / 1e6, 2) for count in (edges, nodes, stem, classifier, edges + nodes + stem + classifier)
    ]
    # A freshly drawn graph has a few dead nodes.
    assert 0.95 < cost(MobileNetV1DNW(), (3, 224, 224)).multiply_adds / 56.55e6 <= 1.0001


def test_every_option_is_documented_and_every_documented_option_exists():
    from dnw_graph.training import ModelOptions, RunOptions

    def flags(options):
        return {"--" + f.name.replace("_", "-") for f in fields(options)}

    run_options = flags(RunOptions) | {"--config"}
    options = {}
    for path in (ROOT / "examples").glob("*.py"):
        for value in runpy.run_path(str(path), run_name="example").values():
            if isinstance(value, type) and issubclass(value, ModelOptions) and value is not ModelOptions:
                options[f"examples/{path.name}"] = flags(value) | run_options
    assert len(options) >= 2
    listed = {row[0].strip("`") for row in rows(ROOT / "docs" / "training.md", 2) if row[0].startswith("`--")}
    assert listed == set().union(*options.values())
    code = "".join(code for page in PAGES for code in blocks(page, "bash"))
    commands = code.replace("\\\n", "").splitlines()
    commands = [shlex.split(line, comments=True) for line in commands if "examples/" in line]
    assert commands
    for _, path, *words in commands:
        given = {word.split(".")[0] for word in words if word.startswith("--")}
        assert given <= options[path] | {"--help"}, words


def test_documented_files_and_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for path in re.findall(r"(?:examples|tests|benchmarks)/[\w./-]*\.\w+", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        commands = re.findall(r"^make .*", "".join(blocks(page, "bash")), re.MULTILINE)
        commands += re.findall(r"`(make [^`]*)`", page.read_text())
        for target in (command.split()[1] for command in commands):
            assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".py":
            assert anchor in lines(target), link
        elif anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert anchor in {title.lower().replace(" ", "-") for title in titles}, link
