"""The tables of the paper: rows, configurations, runs that are resumed, and what is written."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from dnw_graph import create_wiring
from dnw_graph.recipes.models import FAMILIES
from dnw_graph.training import read_checkpoint
from dnw_graph.training.command_line import read_options

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
CIFAR = {
    "data": "cifar10",
    "image_size": 32,
    "epochs": 160,
    "batch_size": 128,
    "warmup_epochs": 0,
    "held_out": 0,
    "momentum": 0.9,
    "weight_decay": 1e-4,
}
TABLES = ("table1", "table2", "table4", "table6", "weight_decay", "imagenette", "rules")


@pytest.fixture(scope="module")
def tables() -> dict[str, ModuleType]:
    """The scripts of the tables."""
    folder = str(ROOT / "benchmarks" / "paper")
    sys.path.insert(0, folder)
    try:
        return {name: __import__(name) for name in TABLES}
    finally:
        sys.path.remove(folder)


def results(folder: Path) -> dict[str, dict]:
    """The results of all runs in a folder, by row, without times."""
    found = {path.parent.parent.name: json.loads(path.read_text()) for path in folder.glob("*/seed0/result.json")}
    for result in found.values():
        result["summary"]["seconds"] = 0
    return found


# What the paper prints, by the configuration of the row.
TABLE_2 = {
    "cifar10_mobilenet_v1_x0.25": "86.3 ± 0.2",
    "cifar10_rg": "87.2 ± 0.1",
    "cifar10_no_update": "86.7 ± 0.5",
    "cifar10_l1_anneal": "84.3 ± 0.6",
    "cifar10_td_0.75": "87.8 ± 0.4",
    "cifar10_td_0.9": "89.0 ± 0.2",
    "cifar10_td_0.95": "89.2 ± 0.4",
    "cifar10_td_0.99": "88.6 ± 0.2",
    "cifar10_td_gamma": "88.8 ± 0.2",
    "cifar10_complete": "",
    "cifar10_lottery_ticket": "87.9 ± 0.3",
    "cifar10_fine_tune_0.1": "89.4 ± 0.2",
    "cifar10_fine_tune_0.01": "89.7 ± 0.1",
    "cifar10_fine_tune_0.001": "88.7 ± 0.2",
    "cifar10_dnw": "89.7 ± 0.2",
    "cifar10_dnw_eps_warmup": "",
}
TABLE_6 = {
    "cifar10_td_0.9": "89.0 ± 0.2",
    "cifar10_td_0.95": "89.2 ± 0.4",
    "cifar10_td_0.99": "88.6 ± 0.2",
    "cifar10_td_gamma": "88.8 ± 0.2",
    "cifar10_td_regular_0.9": "87.9 ± 0.5",
    "cifar10_td_regular_0.95": "87.9 ± 0.2",
    "cifar10_td_regular_0.99": "87.7 ± 0.3",
    "cifar10_td_regular_gamma": "87.9 ± 0.2",
}
TABLE_1 = {
    "tiny_static_rg": "76.1 ± 0.5",
    "tiny_static_dnw": "80.9 ± 0.6",
    "tiny_discrete_rg": "77.3 ± 0.7",
    "tiny_discrete_dnw": "82.3 ± 0.6",
    "tiny_continuous_rg": "78.5 ± 1.2",
    "tiny_continuous_dnw": "83.1 ± 0.3",
}


@pytest.mark.parametrize(("name", "rows"), [("table1", TABLE_1), ("table2", TABLE_2), ("table6", TABLE_6)])
def test_rows_are_those_of_the_paper(tables: dict[str, ModuleType], name: str, rows: dict[str, str]):
    assert {row.config: row.paper for row in tables[name].TABLE.rows} == rows


def expected_config(name: str) -> dict:
    """What a row of Tables 1, 2 and 6 needs, from its name."""
    if name.startswith("tiny"):
        _, time, rule = name.split("_")
        wiring = {"rg": "random_graph", "dnw": "dnw"}[rule]
        tiny = {"dynamics": time, "wiring": wiring, "node_norm_eps": 1e-5, "lr": 0.1, "schedule": "step"}
        return {**CIFAR, **tiny, "batch_size": 512}
    if name == "mobilenet_v1_x0.25":
        return {"model": "mobilenet_v1", "width": 0.25, "lr": 0.1, **CIFAR}
    config = {"model": "mobilenet_v1_dnw", "width": 0.225, "wiring": name, "node_norm_eps": 1e-5, "lr": 0.1, **CIFAR}
    rule, _, value = name.rpartition("_")
    if name == "rg":
        config["wiring"] = "random_graph"
    elif name == "dnw_eps_warmup":
        config |= {"wiring": "dnw", "node_norm_eps": 1e-3, "warmup_epochs": 5}
    elif rule == "fine_tune":
        config |= {"wiring": rule, "lr": float(value)}
    elif rule.startswith("td"):
        options = {"rho": value if value == "gamma" else float(value)}
        if rule == "td_regular":
            options["variant"] = "regular"
        config |= {"wiring": "targeted_dropout", "wiring_options": options}
    return config


@pytest.mark.parametrize("config", sorted(TABLE_1 | TABLE_2 | TABLE_6))
def test_configurations_are_those_of_the_paper(config: str):
    name = config.removeprefix("cifar10_")
    assert yaml.safe_load((CONFIGS / f"{config}.yaml").read_text()) == expected_config(name)


@pytest.mark.parametrize(("name", "schedule"), [("table1", "step"), *((f"table{n}", "cosine") for n in (2, 4, 6))])
def test_schedules_are_those_of_the_paper(tables: dict[str, ModuleType], name: str, schedule: str):
    table = tables[name].TABLE
    default = table.models.defaults.schedule
    assert {table.configured(row).get("schedule", default) for row in table.rows} == {schedule}


@pytest.mark.parametrize("config", sorted(TABLE_1 | TABLE_2 | TABLE_6))
def test_configurations_name_rules_and_options_that_exist(config: str):
    values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    create_wiring(values.get("wiring", "dnw"), **values.get("wiring_options", {}))


def test_rows_of_footnote_2_differ_in_weight_decay_alone(tables: dict[str, ModuleType]):
    table = tables["weight_decay"].TABLE
    decays = [0, 1e-5, 1e-4, 5e-4, 2e-3]
    expected = [{**expected_config("dnw"), "weight_decay": decay} for decay in decays]
    values = [table.configured(row) for row in table.rows]
    assert [{**each, "weight_decay": float(each["weight_decay"])} for each in values] == expected


@pytest.fixture
def started(tables: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> list:
    """The runs that a table starts, which are not done."""
    runs: list = []
    monkeypatch.setattr(sys.modules["runner"], "_execute", lambda given, *_: runs.extend(given) or [])
    return runs


def options_of(run: object) -> tuple:
    """The options of the model and of the run that a run's command gives."""
    models = run.table.models
    return read_options("", models.options, models.defaults, run.command[2:])[:2]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_start_with_quick(
    tables: dict[str, ModuleType], started: list, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = tables[name].TABLE
    assert sys.modules["runner"].main(table, "", ["--quick", "--output", str(tmp_path)]) == 1  # None is finished.
    assert [run.row for run in started] == list(table.rows)
    # The script itself reads the same.
    seen: list = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda create, _, options, *rest: seen.append((create, options)))
    script = runpy.run_path(started[-1].command[1])
    assert script["run_example"](started[-1].command[2:]) == 0
    ((create, options),) = seen
    assert repr((create.__self__, options)) == repr(options_of(started[-1]))  # The script's classes are its own.


def test_quick_runs_end_after_their_warm_up(started: list, tables: dict[str, ModuleType], tmp_path: Path):
    for epochs in ([], ["--epochs", "1"], ["--epochs", "9"]):
        argv = ["--quick", "--output", str(tmp_path / str(epochs)), "--rows", "cifar10_dnw", "cifar10_dnw_eps_warmup"]
        assert sys.modules["runner"].main(tables["table2"].TABLE, "", [*argv, *epochs]) == 1
    assert [options_of(run)[1].warmup_epochs for run in started] == [0, 2, 0, 0, 0, 5]


def test_both_stages_of_a_row_compute_the_same_function(
    started: list, tables: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert sys.modules["runner"].main(tables["table2"].TABLE, "", ["--seeds", "0"]) == 1
    models = {run.row.key: options_of(run)[0] for run in started}
    stages = [(models[run.row.key], models[run.row.first_stage]) for run in started if run.row.first_stage]
    assert len(stages) == 4
    for second, first in stages:
        assert second.shared_by_stages
        assert all(second.identity()[name] == first.identity()[name] for name in second.shared_by_stages)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--epochs", "3"), "cifar10_dnw_eps_warmup: --warmup-epochs is 5, --epochs 3: give more --epochs"),
        (("--epochs", "many"), "cifar10_dnw_eps_warmup: --epochs: expected int, got many"),
        (("--quick", "--epochs", "many"), "cifar10_dnw_eps_warmup: --epochs: expected int, got many"),
        (("--epoch", "3"), "cifar10_dnw_eps_warmup: unknown option --epoch: did you mean --epochs"),
    ],
)
def test_options_that_a_row_cannot_use_are_refused_before_any_run(
    started: list,
    tables: dict[str, ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
):
    rows = ("--rows", "cifar10_dnw_eps_warmup", "--output", str(tmp_path / "runs"))
    assert sys.modules["runner"].main(tables["table2"].TABLE, "", [*rows, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not started
    assert not list(tmp_path.iterdir())


SMALL = {"dynamics": "static", "schedule": "cosine"}
SMALL_CONFIGS = {
    "rg": {**SMALL, "wiring": "random_graph"},
    "td": {**SMALL, "wiring": "targeted_dropout", "wiring_options": {"rho": 0.9}},
    "complete": {**SMALL, "wiring": "complete"},
    "fine_tune": {**SMALL, "wiring": "fine_tune", "lr": 0.01},
}


def write_configs(folder: Path, **changes: dict) -> Path:
    folder.mkdir(parents=True)
    for name, values in {**SMALL_CONFIGS, **changes}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def small(tables: dict[str, ModuleType]) -> object:
    """A table of the tiny static classifier: a random graph, a rule with a setting, and two stages."""
    rows = sys.modules["rows"]
    four = (
        rows.Row("RG", "rg", "1.0 ± 0.1"),
        rows.Row("TD", "td"),
        rows.Row("complete", "complete"),
        rows.Row("FT", "fine_tune", "2.0 ± 0.2", first_stage="complete"),
    )
    return rows.Table("small", "A small table", "examples/cifar10_tiny.py", FAMILIES["tiny"], four, quick={})


SHORT = ("--data=digits", "--image-size=16", "--batch-size=512", "--epochs=1", "--workers=0", "--accelerator=cpu")


def run_small(small: object, *argv: object) -> int:
    return sys.modules["runner"].main(small, "", [*SHORT, "--seeds", "0", "--jobs", "2", *map(str, argv)])


@pytest.fixture(scope="module")
def finished(small: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all rows of the small table."""
    folder = tmp_path_factory.mktemp("small")
    argv = (
        "--configs",
        write_configs(folder / "configs"),
        "--output",
        folder / "runs",
        "--json",
        folder / "small.json",
    )
    assert run_small(small, *argv) == 0
    return folder


@pytest.mark.slow
def test_all_rows_are_run_and_told(finished: Path):
    found = results(finished / "runs")
    assert set(found) == set(SMALL_CONFIGS)
    text = (finished / "runs" / "small.md").read_text()
    for label, name in (("RG", "rg"), ("TD", "td"), ("FT", "fine_tune")):
        top1, best = (f"{100 * found[name]['summary'][which]:.1f}" for which in ("top1", "best_top1"))
        assert f"| {label} | {top1} | {best} | 1 | 1 | 32,000 |" in text
    assert "1.0 ± 0.1" not in text  # the paper's figure is not of digits
    figures = json.loads((finished / "small.json").read_text())
    assert figures == json.loads((finished / "runs" / "small.json").read_text())


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first_and_costs_both(finished: Path):
    found = results(finished / "runs")
    complete, tuned = (
        read_checkpoint(finished / "runs" / name / "seed0" / which)["state_dict"]
        for name, which in (("complete", "last.ckpt"), ("fine_tune", "first.ckpt"))
    )
    of_the_rule = (".num_edges", ".rule")
    assert all(torch.equal(tuned[name], value) for name, value in complete.items() if not name.endswith(of_the_rule))
    rows = {row["model"]: row for row in json.loads((finished / "small.json").read_text())["rows"]}
    stages = [found[name]["summary"]["training_multiply_adds"] for name in ("complete", "fine_tune")]
    assert rows["FT"]["training_multiply_adds"] == sum(stages)
    assert rows["complete"]["training_multiply_adds"] == stages[0] > 4 * stages[1]


@pytest.mark.slow
def test_a_changed_setting_changes_its_row_and_no_other(small: object, finished: Path, tmp_path: Path):
    changed = {**SMALL_CONFIGS["td"], "wiring_options": {"rho": 0.5}}
    configs = write_configs(tmp_path / "configs", td=changed)
    assert run_small(small, "--rows", "rg", "td", "--configs", configs, "--output", tmp_path / "runs") == 0
    one, other = results(finished / "runs"), results(tmp_path / "runs")
    assert one["rg"] == other["rg"]
    dropout = [each["td"]["summary"] for each in (one, other)]
    assert [each["options"]["wiring_options"]["rho"] for each in dropout] == [0.9, 0.5]
    # With ρ = 0.5 instead of 0.9 five times as many of the weak edges take part in training.
    assert dropout[1]["training_multiply_adds"] > 2 * dropout[0]["training_multiply_adds"]


@pytest.mark.slow
def test_complete_rows_are_not_run_again_and_a_failure_is_said(
    small: object, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "td")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.ckpt")}
    broken = {**SMALL_CONFIGS["td"], "wiring": "targeted_dropuot"}
    configs = write_configs(tmp_path / "configs", td=broken)
    assert run_small(small, "--configs", configs, "--output", tmp_path / "runs") == 1
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.ckpt")}
    printed = capsys.readouterr().out
    assert "TD, seed 0: status 2, see" in printed
    assert "did you mean 'targeted_dropout'" in (tmp_path / "runs/td/seed0/log.txt").read_text()
    assert "| RG |" in printed
    assert "| TD |" not in printed


@pytest.mark.slow
def test_sigterm_reaches_the_runs_which_save_their_last_step(tmp_path: Path):
    script = ROOT / "benchmarks" / "paper" / "table1.py"
    command = [sys.executable, str(script), "--quick", "--rows", "tiny_static_rg", "--epochs", "500"]
    with open(tmp_path / "err", "w") as err:
        runner = subprocess.Popen([*command, "--output", str(tmp_path / "runs")], stderr=err, stdout=err)
    run = tmp_path / "runs" / "tiny_static_rg" / "seed0"
    end = time.monotonic() + 120
    while not (run / "last.ckpt").exists() and runner.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    runner.terminate()
    assert runner.wait(60) == 1
    assert "stopped; repeat the command to continue" in (tmp_path / "err").read_text()
    stopped = (run / "log.txt").read_text().splitlines()[-1]
    step = int(stopped.removeprefix("stopped after step ").partition(":")[0])
    assert read_checkpoint(run / "last.ckpt")["global_step"] == step


@pytest.mark.slow
def test_a_folder_with_other_options_is_refused(small: object, finished: Path, capsys: pytest.CaptureFixture[str]):
    argv = ("--configs", finished / "configs", "--output", finished / "runs", "--workers", "1")
    assert run_small(small, *argv) == 0  # an option of the machine
    assert run_small(small, *argv, "--lr", "0.3") == 2
    assert "holds a run with lr None, not '0.3'" in capsys.readouterr().err
    assert run_small(small, *argv, "--finished", "--epochs", "3") == 2
    assert "holds a run with epochs 1, not 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--rows", "cifar10_rng"), "table2 has no row 'cifar10_rng'"),
        (("--jobs", "0"), "--jobs is 0"),
        (("--seed", "3"), "--seed is set for every run"),
        (("--init-from", "run"), "--init_from is set for every run"),
        (("--epochs", "3", "4"), "options for the runs must be --name value"),
        (("--configs", "nowhere"), "does not exist"),
        (("--data-name", "cifar-10"), "did you mean 'cifar10'"),
    ],
)
def test_bad_input(
    tables: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
):
    assert sys.modules["runner"].main(tables["table2"].TABLE, "", argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
