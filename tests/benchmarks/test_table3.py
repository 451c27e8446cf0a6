"""Table 3: its rows are the paper's, its verdicts follow, a checkpoint's wiring is what is counted."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks" / "paper"))

import table3  # noqa: E402
from table3_rows import NAMES, ROWS, Nearest  # noqa: E402

from dnw_graph import InputError  # noqa: E402
from dnw_graph.analysis.cost import cost  # noqa: E402
from dnw_graph.checkpoint import FORMAT, SECTION  # noqa: E402
from dnw_graph.models import MobileNetV1DNW, create_model  # noqa: E402
from dnw_graph.training.checkpoints import WholeFileIO  # noqa: E402

PAPER = """
MobileNetV1 (×0.25) | 0.5M | 41M | 50.6
MobileNetV2 (×0.15)* | — | 39M | 44.9
MobileNetV2 (×0.4)** | — | 43M | 56.6
DenseNet (×0.5)* | — | 42M | 41.1
Xception (×0.5)* | — | 40M | 55.1
ShuffleNetV1 (×0.5, g = 3) | — | 38M | 56.8
ShuffleNetV2 (×0.5) | 1.4M | 41M | 60.3
MobileNetV1-RG (×0.225) | 1.2M | 55.7M | 53.3
MobileNetV1-DNW-Small (×0.15) | 0.24M | 22.1M | 50.3
MobileNetV1-DNW-Small (×0.225) | 0.4M | 41.2M | 59.9
MobileNetV1-DNW (×0.225) | 1.1M | 42.1M | 60.9
MnasNet-search1 | 1.9M | 65M | 64.9
MobileNetV1-DNW (×0.3) | 1.3M | 66.7M | 65.0
MobileNetV1 (×0.5) | 1.3M | 149M | 63.7
MobileNetV2 (×0.6)* | — | 141M | 66.6
MobileNetV2 (×0.75)*** | — | 145M | 67.9
DenseNet (×1)* | — | 142M | 54.8
Xception (×1)* | — | 145M | 65.9
ShuffleNetV1 (×1, g = 3) | — | 140M | 67.4
ShuffleNetV2 (×1) | 2.3M | 146M | 69.4
MobileNetV1-RG (×0.49) | 1.8M | 170M | 64.1
MobileNetV1-DNW (×0.49) | 1.8M | 154M | 70.4
"""
DNW = "mobilenet_v1_dnw_x0.225"


def row_of(name):
    (row,) = (row for row in ROWS if row.name == name)
    return row


def write_checkpoint(path, model, **options):
    identity = {"model": "mobilenet_v1_dnw", "width": 0.225, "small": False, "wiring": "dnw", "image_size": 224}
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    position = {"global_step": 1, "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 1}}}}}
    content = {SECTION: {"format": FORMAT, "options": identity | options}, "state_dict": weights, **position}
    WholeFileIO().save_checkpoint(content, path)
    return path


def test_the_rows_are_the_paper_s():
    printed = [[cell.strip() for cell in line.split("|")] for line in PAPER.strip().splitlines()]
    assert len(printed) == 22
    assert [[row.model, row.parameters or "—", row.flops, str(row.top1)] for row in ROWS] == printed


def test_every_model_of_ours_has_its_configuration():
    configured = {path.stem for path in (ROOT / "examples" / "configs").glob("mobilenet_v1*.yaml")}
    assert {row.name for row in ROWS if row.name} <= configured
    for row in ROWS:
        if row.name:
            text = (ROOT / "examples" / "configs" / f"{row.name}.yaml").read_text()
            assert f"model: {row.options['name']}\n" in text
            assert f"width: {row.options['width']}\n" in text
            assert ("small: true\n" in text) == row.options.get("small", False)
            assert ("wiring: random_graph\n" in text) == (row.options.get("wiring") == "random_graph")


@pytest.mark.parametrize(
    ("printed", "low", "high"),
    [("41M", 40.5e6, 41.5e6), ("55.7M", 55.65e6, 55.75e6), ("0.24M", 0.235e6, 0.245e6), ("170M", 169.5e6, 170.5e6)],
)
def test_a_figure_agrees_up_to_two_percent_beyond_its_rounding(printed, low, high):
    assert table3.interval(printed) == (low, high)
    assert table3.agrees(int(low * 0.98) + 1, printed)
    assert table3.agrees(int(high * 1.02) - 1, printed)
    assert not table3.agrees(int(low * 0.98) - 1, printed)
    assert not table3.agrees(int(high * 1.02) + 1, printed)
    assert table3.agrees(10**9, None)


@pytest.mark.slow
def test_the_upper_bounds_are_those_counted_by_hand():
    edges, nodes, places = (103, 1_244, 4_976, 72_990, 79_626), (32, 192, 384, 2_816, 1_536), (112, 56, 28, 14, 7)
    stages = sum((e + 9 * n) * side**2 for e, n, side in zip(edges, nodes, places, strict=True))
    parameters = 27 * 32 + sum(edges) + 9 * sum(nodes) + 1024 * 1000 + 1000
    norms = 2 * sum(nodes) + 2 * 1024
    found = table3.count(row_of(DNW))
    assert (found.parameters, found.paper_parameters) == (parameters + norms, parameters)
    assert found.multiply_adds == found.paper_multiply_adds == 27 * 32 * 112**2 + stages + 1024 * 1000
    found = table3.count(row_of("mobilenet_v1_dnw_small_x0.225"))
    assert found.multiply_adds == found.paper_multiply_adds == 27 * 32 * 112**2 + stages + 230_400
    # No wiring of these edges costs more, however its nodes are connected.
    for small in (False, True):
        model = MobileNetV1DNW(0.15, small=small, wiring="random_graph")
        for paper in (False, True):
            result = cost(model, (3, 224, 224), paper=paper)
            bound = cost(model, (3, 224, 224), paper=paper, dead_nodes=True)
            assert 0.8 * bound.multiply_adds < result.multiply_adds <= bound.multiply_adds
            assert 0.98 * bound.parameters < result.parameters <= bound.parameters


def test_the_figures_in_the_note_on_the_larger_random_graph():
    wide, narrow = (
        cost(MobileNetV1DNW(width, wiring="random_graph"), (3, 224, 224), paper=True, dead_nodes=True)
        for width in (0.51, 0.49)
    )
    assert (f"{wide.multiply_adds / 1e6:.1f}M", f"{wide.parameters / 1e6:.1f}M") == ("169.6M", "1.9M")
    assert f"{narrow.multiply_adds / 1e6:.1f}M" == "158.8M"
    note = row_of("mobilenet_v1_rg_x0.49").note
    assert all(figure in note for figure in ("169.6M", "1.9M", "158.8M"))


def test_the_figures_in_the_docs():
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| MobileNetV1")
    ]
    assert [cells[0] for cells in table] == [row.model for row in ROWS if row.name]
    for row, (_, *cells) in zip([row for row in ROWS if row.name], table, strict=True):
        figures = [row.parameters, row.flops, f"{row.top1}%"]
        result = cost(create_model(**row.options), (3, 224, 224), paper=True, dead_nodes=True)
        counted = f"{result.parameters / 1e6:.2f}M, {result.multiply_adds / 1e6:.1f}M"
        assert [cell.replace(" M", "M") for cell in cells] == [*figures, counted]


def test_learned_rows_without_a_checkpoint_are_upper_bounds_above_the_paper_s():
    for name in NAMES:
        row = row_of(name)
        if row.options["wiring"] == "dnw":
            counted = table3.count(row)
            assert counted.verdict == "upper bound"
            assert counted.multiply_adds > table3.interval(row.flops)[0]
            assert counted.parameters > table3.interval(row.parameters)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("mobilenet_v1_x0.25", "agrees"),
        ("mobilenet_v1_x0.5", "agrees"),
        ("mobilenet_v1_rg_x0.225", "agrees"),
        ("mobilenet_v1_rg_x0.49", "differs"),
    ],
)
def test_rows_that_are_built(name, verdict):
    counted = table3.count(row_of(name))
    assert counted.verdict == verdict
    assert counted.multiply_adds <= counted.paper_multiply_adds
    # A figure that is off is found to be off.
    assert table3.count(replace(row_of(name), flops="30M")).verdict == "differs"
    assert table3.count(replace(row_of(name), parameters="0.1M")).verdict == "differs"


@pytest.mark.slow
def test_a_checkpoint_s_wiring_is_counted(tmp_path):
    model = MobileNetV1DNW(0.225)
    weight = model.stages[3].candidates.weight.data
    source, target = model.stages[3].candidates.pairs(torch.arange(len(weight)))
    # Edges lead from the inputs to the second block alone: no output of the stage has an edge.
    weight[(source >= 256) | (target >= 768)] = 0
    path = write_checkpoint(tmp_path / "last.ckpt", model)
    counted = table3.count(row_of(DNW), path)
    live, paper = cost(model, (3, 224, 224)), cost(model, (3, 224, 224), paper=True)
    assert (counted.parameters, counted.multiply_adds) == (live.parameters, live.multiply_adds)
    assert (counted.paper_parameters, counted.paper_multiply_adds) == (paper.parameters, paper.multiply_adds)
    bound = table3.count(row_of(DNW))
    # Nothing before the fourth stage is of use; the paper's count sees the 2,560 inner nodes of that stage only.
    assert counted.multiply_adds < 0.3 * bound.multiply_adds
    assert 9 * 14**2 * 2560 <= bound.multiply_adds - counted.paper_multiply_adds < 0.2 * bound.multiply_adds
    assert str(path) in counted.what
    assert counted.verdict == "differs"
    (line,) = (text for text in table3.lines([(row_of(DNW), counted)]) if text.startswith("MobileNetV1-DNW"))
    assert "this run's wiring" in line


def test_checkpoints_of_other_models_are_refused(tmp_path):
    model = MobileNetV1DNW(0.225, num_classes=10)
    wide = write_checkpoint(tmp_path / "wide.ckpt", model, width=0.3, wiring="no_update")
    with pytest.raises(InputError, match=rf"not a checkpoint of {DNW}: it has width 0.3, not 0.225, wiring"):
        table3.count(row_of(DNW), wide)
    with pytest.raises(InputError, match=r"does not fit .* with 1,000 classes"):
        table3.count(row_of(DNW), write_checkpoint(tmp_path / "ten.ckpt", model))


def test_a_library_that_is_missing_leaves_the_row_cited():
    row = replace(ROWS[1], nearest=Nearest("no_such_library", "model"))
    counted = table3.count(row)
    assert counted.verdict == "cited only"
    assert table3.lines([(row, counted)])[-1].endswith("cited only: no_such_library model: not installed.")


def test_every_row_is_printed_and_every_other_figure_explained(tmp_path, capsys, monkeypatch):
    """With small models in place of all others: the table, its notes and the file."""
    monkeypatch.setattr(table3, "cost", lambda model, size, **_: cost(nn.Linear(5, 3), (5,)))
    monkeypatch.setattr(table3, "create_model", lambda *_, **__: nn.Linear(5, 3))
    monkeypatch.setattr(Nearest, "build", lambda self: nn.Linear(5, 3))
    path = tmp_path / "table3.json"
    assert table3.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed if line.startswith("| ")]
    assert [row[0] for row in cells[2:]] == [row.model for row in ROWS]
    # Nothing of 18 parameters and 15 multiply-adds agrees with anything.
    assert "agrees" not in {row[-1] for row in cells[2:]}
    for row, (*_, verdict) in zip(ROWS, cells[2:], strict=True):
        if row.options.get("name") == "mobilenet_v1":
            continue  # what they cost leaves nothing open: they agree, see above
        assert any(line.startswith(f"{row.model}: {verdict}: ") for line in printed), row.model
    saved = json.loads(path.read_text())["rows"]
    assert [row["paper"] for row in saved] == [
        {"parameters": row.parameters, "flops": row.flops, "top1": row.top1} for row in ROWS
    ]
    assert saved[0]["parameters"] == 18
    assert [file.name for file in tmp_path.iterdir()] == ["table3.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "last.ckpt"], "NAME=PATH"),
        (["--checkpoint", "mobilenet_v1_dnw_x0.22=a"], "did you mean 'mobilenet_v1_dnw_x0.225'"),
        (["--checkpoint", f"{DNW}=nowhere.ckpt"], "not a file"),
        (["--json", "no/folder/table3.json"], "the directory no/folder does not exist"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(table3, "ROWS", [row_of(DNW)])
    assert table3.main(arguments) == 2
    assert message in capsys.readouterr().err
