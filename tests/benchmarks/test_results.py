"""Records of runs, tables of them beside the paper's figures, and the page that is made of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dnw_graph import InputError

ROOT = Path(__file__).parents[2]
MODULES = ("record", "report", "results", "rows", "runner", "shrink", "table1", "table2", "table6", "weight_decay")


@pytest.fixture(scope="module")
def paper() -> dict[str, ModuleType]:
    """The scripts of the tables."""
    folder = str(ROOT / "benchmarks" / "paper")
    sys.path.insert(0, folder)
    try:
        return {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(folder)


# Table 1, static random graph: the configuration, as somebody would write it by hand.
ASKED = {
    "dynamics": "static",
    "wiring": "random_graph",
    "data": "cifar10",
    "image_size": 32,
    "epochs": 160,
    "batch_size": 512,
    "lr": 0.1,
    "schedule": "step",
    "momentum": 0.9,
    "weight_decay": 1e-4,
}


def made(row: str = "tiny_static_rg", seed: int = 0, top1: float = 0.75, **changes: Any) -> dict[str, Any]:
    """A record, of which options (or data) were changed."""
    options = {**ASKED, "wiring": "dnw" if row.endswith("dnw") else "random_graph", **changes}
    summary = {
        "top1": top1,
        "best_top1": top1 + 0.01,
        "parameters": 43_000,
        "multiply_adds": 2_000_000,
        "training_multiply_adds": 10**12,
        "seconds": 60.0,
        "graphs": {"static_graph": {"real_edges": 3, "dead_nodes": 1}},
        "weights": {},
        "options": {
            "train_images": 50_000,
            "held_out": 0,
            "precision": "32-true",
            **options,
            "epochs": int(options["epochs"]),
        },
    }
    start = dict.fromkeys(("machine", "threads", "python", "torch", "torchvision", "lightning", "date"), "1")
    return {
        "name": f"{row}-{options['data']}-seed{seed}",
        "table": "table1",
        "row": row,
        "seed": seed,
        "data": options["data"],
        "options": {**options, "seed": str(seed)},
        "starts": [{**start, "commit": "0123456789abcdef"}],
        "summary": summary,
        "top1_per_epoch": [top1],
    }


def lines(paper: dict[str, ModuleType], *results: dict[str, Any]) -> list[str]:
    table = paper["table1"].TABLE
    return paper["report"].table_lines(table, table.rows, results)[0]


def test_mean_and_standard_deviation(paper: dict[str, ModuleType]):
    results = [made(seed=seed, top1=top1) for seed, top1 in enumerate((0.5, 0.52, 0.57))]
    table = paper["table1"].TABLE
    text, figures = paper["report"].table_lines(table, table.rows, results)
    assert figures["rows"][0]["top1"] == pytest.approx(53)
    # (9 + 1 + 16) / 2 = 13: the standard deviation of a sample.
    assert figures["rows"][0]["top1_std"] == pytest.approx(13**0.5)
    assert any(
        line.startswith("| Static (RG) | 76.1 ± 0.5 | 53.0 ± 3.6 | 54.0 ± 3.6 | 3 | 160 | 3 | 1 |") for line in text
    )


def test_what_a_row_does_not_have_is_a_dash(paper: dict[str, ModuleType]):
    dense, table = made(), paper["table1"].TABLE
    dense["summary"]["graphs"] = {}
    other = paper["rows"].Row("No figure", "tiny_static_rg", name="other")
    results = [dense, {**made(), "row": "other"}]
    text, _ = paper["report"].table_lines(table, (*table.rows, other), results)
    assert any(line.startswith("| Static (RG) | 76.1 ± 0.5 | 75.0 | 76.0 | 1 | 160 | – | – | 43,000") for line in text)
    assert any(line.startswith("| No figure | – | 75.0 | 76.0 | 1 | 160 | 3 | 1 | 43,000") for line in text)


@pytest.mark.parametrize(
    "same", [{}, {"data": "cifar10-jpeg75"}, {"lr": "0.1", "weight_decay": "1e-4", "epochs": "160"}, {"workers": "0"}]
)
def test_runs_of_the_papers_data_and_schedule_stand_beside_its_figures(
    paper: dict[str, ModuleType], same: dict[str, Any]
):
    assert any("| Static (RG) | 76.1 ± 0.5 | 75.0 |" in line for line in lines(paper, made(**same)))


@pytest.mark.parametrize(
    "other",
    [
        {"data": "digits"},
        {"data": "/some/folder"},
        {"epochs": "30"},
        {"weight_decay": "5e-5"},
        {"warmup_epochs": "5"},
        {"held_out": "5000"},
    ],
)
def test_runs_of_other_data_or_options_do_not(paper: dict[str, ModuleType], other: dict[str, Any]):
    text = "\n".join(lines(paper, made(**other)))
    assert "| Static (RG) | 75.0 |" in text
    assert "paper" not in text
    assert "76.1" not in text
    # Not even in a row of several seeds, one of which is as in the paper.
    assert "76.1" not in "\n".join(lines(paper, made(), made(seed=1, **other)))


def test_a_free_option_has_a_column(paper: dict[str, ModuleType]):
    table = paper["table1"].TABLE
    results = [made(precision="bf16-mixed"), made("tiny_static_dnw")]
    assert all("76.1" not in line for line in paper["report"].table_lines(table, table.rows, results)[0])
    free = dataclasses.replace(table, free=("precision",))
    text, figures = paper["report"].table_lines(free, free.rows, results)
    assert any(line.endswith("| training | precision | minutes × threads |") for line in text)
    for start, end in (("Static (RG) | 76.1 ± 0.5", "bf16-mixed"), ("Static (DNW) | 80.9 ± 0.6", "32-true")):
        assert any(line.startswith(f"| {start}") and f"T | {end} | 1.0 ×" in line for line in text)
    assert [row["options"] for row in figures["rows"]] == [{"precision": "bf16-mixed"}, {"precision": "32-true"}]


@pytest.mark.parametrize("default", [{"node_norm_eps": 1e-3}, {"warmup_epochs": 1}, {"held_out": 5000}])
def test_runs_that_were_not_asked_for_the_papers_options_do_not(paper: dict[str, ModuleType], default: dict[str, Any]):
    run = made()
    run["summary"]["options"] |= default  # those of the example
    assert "76.1" not in "\n".join(lines(paper, run))


def test_runs_with_held_out_images_say_which_images_their_accuracies_are_of(paper: dict[str, ModuleType]):
    assert "best on these very images" in lines(paper, made())[-1]
    assert (
        "on the test images after the epoch that was best on the held-out ones" in lines(paper, made(held_out=5000))[-1]
    )


def test_quick_runs_do_not(paper: dict[str, ModuleType]):
    quick = paper["table1"].TABLE.quick
    assert "76.1" not in "\n".join(lines(paper, made(**quick)))
    assert "76.1" not in paper["results"].page([made(**quick)])


def test_the_page_keeps_kinds_of_runs_apart(paper: dict[str, ModuleType]):
    text = paper["results"].page([made(), made(seed=1, epochs="30"), made(row="tiny_static_dnw", epochs="30")])
    first, second = text.split("### Other data or options: CIFAR-10, epochs 30")
    assert "| Static (RG) | 76.1 ± 0.5 | 75.0 | 76.0 | 1 | 160 |" in first
    assert "| Static (RG) | 75.0 | 76.0 | 1 | 30 |" in second
    assert "| Static (DNW) | 75.0 | 76.0 | 1 | 30 |" in second
    assert "No run of Static (DNW); Discrete Time (RG)" in first
    assert "Of 5 seeds Static (RG) has 1" in first
    assert "- Table 2: ways of finding a wiring" in second.split("## Not run yet")[1]


def test_margins(paper: dict[str, ModuleType]):
    one = [made(seed=0, top1=0.70), made("tiny_static_dnw", 0, top1=0.73)]
    # √(0.7 · 0.3 / 10,000 + 0.73 · 0.27 / 10,000) = 0.64%
    expected = (
        "+3.0 points with one seed; the choice of test images alone gives a standard error of 0.6 if the two err "
        "independently, and less if they err on the same images (paper: +4.8)."
    )
    assert f"- Static (DNW) − Static (RG): {expected}" in paper["results"].page(one)
    more = [made(seed=1, top1=0.70), made("tiny_static_dnw", 1, top1=0.75), made("tiny_static_dnw", 2, top1=0.2)]
    # 3 and 5 points: standard deviation √2, standard error 1.
    expected = "+4.0 ± 1.0 points, standard error over 2 seeds (paper: +4.8)."
    assert f"- Static (DNW) − Static (RG): {expected}" in paper["results"].page([*one, *more])


def test_the_page_keeps_the_original_images_and_their_copies_apart(paper: dict[str, ModuleType]):
    copies = made(seed=0, data="cifar10-jpeg75"), made("tiny_static_dnw", 0, top1=0.78, data="cifar10-jpeg75")
    text = paper["results"].page([made(seed=0, top1=0.9), *copies])
    original, lossy = text.split("CIFAR-10 as JPEG copies of quality 75, which are lossy; train images")
    assert "| Static (RG) | 76.1 ± 0.5 | 90.0 | 91.0 | 1 |" in original
    assert "No run of Static (DNW)" in original
    assert "points with" not in original
    assert "| Static (RG) | 76.1 ± 0.5 | 75.0 | 76.0 | 1 |" in lossy
    assert "- Static (DNW) − Static (RG): +3.0 points with one seed" in lossy


def test_a_run_of_two_tables_counts_once_in_each(paper: dict[str, ModuleType]):
    name = "cifar10_td_0.9"
    table = paper["table2"].TABLE
    row = next(row for row in table.rows if row.key == name)
    options = {**table.configured(row), "data": "cifar10"}
    run = {**made(row=name), "options": options, "table": "table2"}
    run["summary"] |= {"options": {**run["summary"]["options"], **options}}
    text = paper["results"].page([run, {**run, "table": "table6"}])
    assert text.count(" | 89.0 ± 0.2 | 75.0 | 76.0 | 1 | 160 |") == 2  # once in each table


def test_dead_nodes_by_weight_decay_have_a_place_on_the_page(paper: dict[str, ModuleType]):
    table = paper["weight_decay"].TABLE
    row = table.rows[0]
    run = {**made(row=row.key), "options": {**table.configured(row), "data": "cifar10"}, "table": table.name}
    run["summary"]["options"] |= run["options"]
    assert "| weight decay 0 | 75.0 |" in paper["results"].page([run])
    assert paper["results"].picture([run])


def test_the_page_is_that_of_the_records(paper: dict[str, ModuleType]):
    results = paper["record"].read(paper["record"].RESULTS)
    make = "python benchmarks/paper/results.py makes it anew"
    assert paper["results"].PAGE.read_text() == paper["results"].page(results), make
    if results:
        assert paper["results"].digest(results) in paper["results"].PICTURE.read_text(), make


def test_the_readme_quotes_the_records(paper: dict[str, ModuleType]):
    top1: dict[str, list[float]] = {}
    for result in paper["record"].read(paper["record"].RESULTS):
        top1.setdefault(result["row"], []).append(100 * result["summary"]["top1"])
    lines = (ROOT / "README.md").read_text().splitlines()
    for start, *rows in (
        ("tiny static graph", "tiny_static_rg", "tiny_static_dnw"),
        ("ResNet-20", "resnet20_random_graph_0.05", "resnet20_dnw_0.05", "resnet20_dense"),
        ("MobileNetV1-DNW", "mobilenet_v1_rg_x0.225", "mobilenet_v1_dnw_x0.225", "mobilenet_v1_x0.25"),
    ):
        (line,) = (line for line in lines if line.startswith(f"| {start}"))
        quoted = [cell.strip() for cell in line.split("|")[3:-1]]
        assert [cell for cell in quoted if cell] == [f"{mean(top1[row]):.1f}" for row in rows]


def test_records_kept_are_of_this_repository_alone(paper: dict[str, ModuleType]):
    for path in paper["record"].RESULTS.glob("*/*.json"):
        text = path.read_text()
        result = json.loads(text)
        assert path.parent.name == result["table"]
        assert path.stem == result["name"]
        assert result["data"] in paper["rows"].DATA
        assert '"/' not in text  # no path of a machine
        assert result["top1_per_epoch"][-1] == pytest.approx(result["summary"]["top1"], abs=1e-5)
        assert max(result["top1_per_epoch"]) == pytest.approx(result["summary"]["best_top1"], abs=1e-5)
        assert len(result["top1_per_epoch"]) == result["summary"]["options"]["epochs"]


def test_a_picture_of_the_curves(paper: dict[str, ModuleType]):
    results = [made(), made(seed=1)]
    assert paper["results"].digest(results) in paper["results"].picture(results).decode()


def of_row(table: Any, row: Any, **changes: Any) -> dict[str, Any]:
    options = {**table.configured(row), **changes}
    result = {**made(row=row.key), "options": options, "table": table.name, "data": table.data[0]}
    result["name"] = "-".join([row.key, *changes])
    result["summary"]["options"] |= options
    return result


def test_no_two_curves_of_a_panel_look_alike(paper: dict[str, ModuleType]):
    for table in paper["results"].TABLES:
        runs = [of_row(table, row) for row in table.rows]
        panels = paper["results"].drawing(runs).axes  # of tables that share rows, too
        (panel,) = (each for each in panels if table.title.startswith(each.get_title().partition("\n")[0]))
        assert [line.get_label() for line in panel.lines] == [row.label for row in table.rows]
        assert len({(line.get_color(), line.get_linestyle()) for line in panel.lines}) == len(table.rows)


def test_curves_are_of_runs_as_configured_by_data(paper: dict[str, ModuleType]):
    table = paper["table1"].TABLE
    runs = [of_row(table, table.rows[0], **changes) for changes in ({}, {"epochs": 30}, {"lr": 0.2})]
    (panel,) = paper["results"].drawing(runs).axes
    assert len(panel.lines) == 1
    copies = {**runs[0], "data": table.data[1], "name": "copies"}
    titles = [panel.get_title() for panel in paper["results"].drawing([*runs, copies]).axes]
    assert [title.partition("\n")[2] for title in titles] == ["CIFAR-10", "CIFAR-10 as JPEG copies of quality 75"]
    assert paper["results"].picture(runs[1:])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of two epochs."""
    summary = made(data="/data/cifar10", epochs=2)["summary"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.csv").write_text("epoch,step,val/top1\n0,9,\n0,96,0.5123456\n1,193,0.75\n1,193,\n")
    return tmp_path


def test_a_record_names_the_data_and_holds_the_curve(paper: dict[str, ModuleType], run: Path):
    table = paper["table1"].TABLE
    options = {**ASKED, "data": "/data/cifar10", "epochs": "2", "workers": "0"}
    result = paper["record"].record(table, table.rows[0], 3, "cifar10-jpeg75", options, [], run)
    assert result["top1_per_epoch"] == [0.51235, 0.75]
    assert result["name"] == "tiny_static_rg-epochs-2-data-cifar10-jpeg75-seed3"
    assert "/data" not in json.dumps(result)
    path = paper["record"].keep(result, run / "results")
    assert path == run / "results" / "table1" / "tiny_static_rg-epochs-2-data-cifar10-jpeg75-seed3.json"
    assert paper["record"].read(run / "results") == [result]
    original = paper["record"].record(table, table.rows[0], 3, "cifar10", options, [], run)
    assert original["name"] == "tiny_static_rg-epochs-2-seed3"


def test_a_record_with_options_that_the_run_did_not_have_is_refused(paper: dict[str, ModuleType], run: Path):
    table = paper["table1"].TABLE
    with pytest.raises(InputError, match="holds a run with epochs 2, not 160"):
        paper["record"].record(table, table.rows[0], 0, "cifar10", ASKED, [], run)


def test_finished_runs_are_told_without_running_any(
    paper: dict[str, ModuleType],
    run: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path_factory.mktemp("runs")
    shutil.copytree(run, output / "tiny_static_rg" / "seed0")
    argv = ["--finished", "--epochs", "2", "--seeds", "0", "--data", "/data/cifar10", "--output", str(output)]
    assert paper["runner"].main(paper["table1"].TABLE, "", [*argv, "--results", str(output / "kept")]) == 0
    assert "| Static (RG) | 75.0 | 76.0 | 1 | 2 |" in capsys.readouterr().out
    assert len(list((output / "kept").rglob("*.json"))) == 1
    assert not (output / "tiny_static_dnw").exists()


def test_records_are_of_accuracies_on_test_images(
    paper: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["--data", "/data/cifar10", "--held-out", "5000", "--output", str(tmp_path / "runs")]
    assert paper["runner"].main(paper["table1"].TABLE, "", [*argv, "--results", str(tmp_path / "kept")]) == 2
    assert "with --held-out they are of other images" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_environment_of_a_run_has_its_devices(paper: dict[str, ModuleType]):
    start = paper["record"].here(2, {"devices": "4", "accelerator": "cpu", "compile": True, "lr": "0.1"})
    assert start["devices"] == "4"
    assert start["compile"] is True
    assert "lr" not in start
    run = made()
    run["starts"][0] |= {"devices": "4"}
    assert "devices 4" in paper["report"].where([run])


def test_images_are_brought_to_80_pixels_on_the_shorter_side(paper: dict[str, ModuleType], tmp_path: Path):
    place = tmp_path / "from" / "train" / "n01440764" / "a.JPEG"
    place.parent.mkdir(parents=True)
    Image.new("RGB", (300, 200), "red").save(place)
    paper["shrink"].shrink(tmp_path / "from", tmp_path / "to")
    with Image.open(tmp_path / "to" / "train" / "n01440764" / "a.JPEG") as image:
        assert image.size == (120, 80)
