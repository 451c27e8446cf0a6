"""Every rule from the command line: its options, its checkpoints, and the two stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyModel
from torch import nn

from dnw_graph import InputError, Schedule, TargetedDropout
from dnw_graph.training import ImageData, RunOptions, WiringOptions, main, option, read_checkpoint, run
from dnw_graph.wirings import WIRINGS, Wiring

K = 40
DEFAULTS = RunOptions(image_size=8, batch_size=32, epochs=1, lr=0.3, accelerator="cpu")
SECOND = ("lottery_ticket", "fine_tune")
Create = Callable[[int, int], nn.Module]

pytestmark = pytest.mark.usefixtures("few_digits")


@dataclass(frozen=True)
class TinyOptions(WiringOptions):
    """The tiny model with any rule."""

    k: int = option(K, "number of edges")

    def with_wiring(self, wiring: Wiring, num_classes: int, image_size: int) -> nn.Module:
        model = TinyModel(num_classes)
        model.graph.rewire(wiring, self.k)
        return model


def start(*argv: str) -> int:
    return main("Train a tiny model.", TinyOptions, DEFAULTS, argv)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Create, dict[str, Any], RunOptions]]:
    """What the command line hands to a run, instead of a run."""
    seen: list[tuple[Create, dict[str, Any], RunOptions]] = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    return seen


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model_state(path: str) -> dict[str, Any]:
    state = read_checkpoint(path)["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


@pytest.mark.slow
def test_both_second_stages_from_a_complete_run(capsys: pytest.CaptureFixture[str]):
    assert start("--wiring", "complete", "--output", "complete", "--epochs", "2") == 0
    trained = model_state("complete/last.ckpt")["graph.candidates.weight"]
    edges = sorted(np.argsort(-trained.abs().numpy(), kind="stable")[:K].tolist())
    for rule, begin in zip(SECOND, ("first", "last"), strict=True):
        assert start("--wiring", rule, "--complete", "complete", "--lr", "0.01", "--output", rule) == 0
        first, last, expected = (
            model_state(f"{directory}.ckpt") for directory in (f"{rule}/first", f"{rule}/last", f"complete/{begin}")
        )
        assert all(torch.equal(value, first[key]) for key, value in expected.items() if not key.endswith("rule"))
        assert first["graph.wiring.index"].tolist() == last["graph.wiring.index"].tolist() == edges
        assert not torch.equal(first["graph.candidates.weight"], last["graph.candidates.weight"])
        assert start("--wiring", rule, "--evaluate", f"{rule}/last.ckpt") == 0
        assert start("--wiring", rule, "--lr", "0.01", "--resume", f"{rule}/last.ckpt") == 0
        out, err = capsys.readouterr()
        tops = [line for line in out.splitlines() if line.startswith("top-1")]
        assert err == ""
        assert len({line.split()[1] for line in tops[-3:]}) == 1  # trained, evaluated, resumed at its end


@pytest.mark.parametrize("rule", sorted(WIRINGS.keys() - {"nm"}))  # whose k follows from n and m
def test_every_rule_is_a_name_on_the_command_line(rule: str, made: list[Any]):
    assert start("--wiring", rule) == 0
    create, identity, *_ = made[0]
    model = create(10, 8)
    assert type(model.graph.wiring) is WIRINGS[rule]
    assert model.graph.num_edges == K
    assert identity == {"wiring": rule, "wiring_options": {}, "k": K}


def test_the_default_is_the_papers_rule(made: list[Any]):
    assert start() == 0
    assert made[0][1]["wiring"] == "dnw"


@pytest.mark.parametrize("how", ["command line", "file"])
def test_options_of_a_rule(how: str, made: list[Any], tmp_path: Path):
    if how == "command line":
        arguments = ["--wiring-options.rho", "0.9", "--wiring-options.variant", "regular"]
    else:
        (tmp_path / "c.yaml").write_text("wiring_options: {rho: 0.9, variant: regular}\n")
        arguments = ["--config", "c.yaml"]
    assert start("--wiring", "targeted_dropout", *arguments) == 0
    create, identity, *_ = made[0]
    wiring = create(10, 8).graph.wiring
    assert isinstance(wiring, TargetedDropout)
    assert (wiring.rho, wiring.variant) == (Schedule(0.9, 0.9, 0, 0), "regular")
    assert identity["wiring_options"] == {"rho": 0.9, "variant": "regular"}


@pytest.mark.slow
def test_schedules_come_from_a_file_and_the_number_of_steps_from_the_run(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(
        "wiring: l1_anneal\n"
        "wiring_options:\n"
        "  strength: {start: 0.001, end: 0.0}\n"
        "  removal: {start: 0.0, end: 1.0, begin: 0.0, until: 1.0, shape: linear}\n"
        "output: run\n"
    )
    assert start("--config", "c.yaml", "--epochs", "2") == 0
    state = model_state("run/last.ckpt")
    steps = 2 * (180 // 32)
    assert (state["graph.wiring.num_steps"], state["graph.wiring.step"]) == (steps, steps)
    assert int(state["graph.wiring.real"].sum()) == K
    first = model_state("run/first.ckpt")
    assert first["graph.wiring.real"].all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wiring", "dnv"], "unknown wiring 'dnv': did you mean 'dnw'"),
        (["--wiring-options.rho", "0.9"], "wiring 'dnw' has no options; got 'rho'"),
        (["--wiring", "targeted_dropout", "--wiring-options.roh", "1"], "did you mean 'rho'"),
        (["--wiring", "targeted_dropout", "--wiring-options.rho", "1.5"], "rho must be a share within 0 … 1; got 1.5"),
        (["--wiring", "fine_tune"], "needs a trained complete graph: train one with wiring 'complete'"),
        (["--wiring", "lottery_ticket"], "or, in the examples, --complete DIRECTORY"),
        (["--wiring", "fine_tune", "--wiring-options.trained", "a.ckpt"], "trained must be a tensor"),
        (["--wiring", "fine_tune", "--complete", "gone"], "'gone/last.ckpt' is not a file"),
        (["--wiring", "fine_tune", "--complete", ""], "--complete is ''"),
        (["--complete", "complete"], "--complete goes with --wiring lottery_ticket or fine_tune"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], message: str, unchecked: None, capsys: pytest.CaptureFixture[str]
):
    assert start(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.slow
def test_a_first_stage_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str]):
    assert start("--wiring", "complete", "--output", "complete") == 0
    assert start("--wiring", "dnw", "--output", "dnw") == 0
    capsys.readouterr()
    for directory, changes, message in (
        ("dnw", [], "needs a run with --wiring 'complete', but dnw/last.ckpt was trained with 'dnw'"),
        ("complete", ["--image-size", "16"], "needs a run with --image-size 16, but complete/last.ckpt"),
    ):
        assert start("--wiring", "fine_tune", "--complete", directory, "--output", "x", *changes) == 2
        assert message in capsys.readouterr().err


class StoppedError(Exception):
    pass


def create_with(options: TinyOptions, stop_at: int | None = None) -> Create:
    """The model of the options; fails in a step of training."""

    def create(num_classes: int, image_size: int) -> nn.Module:
        model = options.create(num_classes, image_size)
        steps = iter(range(100))

        def stop(*args: Any) -> None:
            if model.training and next(steps) == stop_at:
                raise StoppedError

        model.register_forward_pre_hook(stop)
        return model

    return create


RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "targeted_dropout": ("targeted_dropout", {"rho": 0.5}),
    "targeted_dropout, regular, scheduled": (
        "targeted_dropout",
        {"rho": {"start": 0.2, "end": 0.9}, "variant": "regular"},
    ),
    "l1_anneal": ("l1_anneal", {"strength": {"start": 0.0, "end": 0.01}, "removal": {"start": 0.0, "end": 1.0}}),
    "no_update": ("no_update", {}),
    "random_graph": ("random_graph", {"separate_scores": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_gives_the_numbers_of_an_unbroken_one(
    rule: str, small_digits: ImageData, options: Callable[..., RunOptions], tmp_path: Path
):
    name, its_options = RULES[rule]
    model = TinyOptions(wiring=name, wiring_options=its_options)
    unbroken = run(create_with(model), model.identity(), options(output=str(tmp_path / "unbroken")), small_digits)
    chosen = options(save_every=1)
    with pytest.raises(StoppedError):
        run(create_with(model, stop_at=5), model.identity(), chosen, small_digits)
    last = f"{chosen.output}/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 5
    resumed = run(create_with(model), model.identity(), replace(chosen, resume=last), small_digits)
    assert replace(resumed, seconds=None) == replace(unbroken, seconds=None)
    one, other = read_checkpoint(last), read_checkpoint(tmp_path / "unbroken" / "last.ckpt")
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    rows = [(directory / "metrics.csv").read_text() for directory in (Path(last).parent, tmp_path / "unbroken")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_the_penalty_is_logged_and_part_of_what_is_minimised(
    small_digits: ImageData, options: Callable[..., RunOptions], tmp_path: Path
):
    sums = []
    for strength in (0.0, 0.5):
        removal = {"start": 0.0, "end": 0.0}
        model = TinyOptions(wiring="l1_anneal", wiring_options={"strength": strength, "removal": removal})
        chosen = options(lr=0.01, output=str(tmp_path / str(strength)))
        run(model.create, model.identity(), chosen, small_digits)
        sums.append(model_state(f"{chosen.output}/last.ckpt")["graph.candidates.weight"].abs().sum().item())
        assert "train/penalty" in (tmp_path / str(strength) / "metrics.csv").read_text()
    assert sums[1] < 0.8 * sums[0]


def test_a_resumed_run_must_share_the_options_of_its_rule(small_digits: ImageData, options: Callable[..., RunOptions]):
    model = TinyOptions(wiring="targeted_dropout", wiring_options={"rho": 0.5})
    chosen = options(epochs=1)
    run(model.create, model.identity(), chosen, small_digits)
    resumed = replace(chosen, resume=f"{chosen.output}/last.ckpt")
    for changes, message in (
        ({"wiring": "dnw", "wiring_options": {}}, "--wiring is 'dnw', but .* was trained with 'targeted_dropout'"),
        ({"wiring_options": {"rho": 0.6}}, r"--wiring-options is \{'rho': 0.6\}, but .* trained with \{'rho': 0.5\}"),
        ({"k": 41}, "--k is 41, but .* was trained with 40"),
    ):
        other = replace(model, **changes)
        with pytest.raises(InputError, match=message):
            run(other.create, other.identity(), resumed, small_digits)


def test_the_first_stage_is_no_part_of_what_identifies_a_run():
    assert TinyOptions(wiring="fine_tune", complete="a").identity() == TinyOptions(wiring="fine_tune").identity()
