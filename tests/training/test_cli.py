"""The command ``dnw-graph``."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_loading import CLASSES, OPTIONS, PREPROCESS, write
from torch import nn

import dnw_graph
from dnw_graph import InputError, RandomGraph, load
from dnw_graph.cli import main
from dnw_graph.compaction import compact, save_compact
from dnw_graph.model_card import ModelCard
from dnw_graph.recipes.models import FAMILIES, MobileNetOptions, TinyOptions
from dnw_graph.training import register_models
from dnw_graph.training.comparison import COLUMNS, table


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return MobileNetOptions(width=0.1, wiring="random_graph").create(3, 16).eval()


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(PREPROCESS, CLASSES, "mobilenet", OPTIONS, {"top1": 0.75, "step": 9}, {"torch": "2.14"})


@pytest.fixture
def trained(tmp_path: Path, model: nn.Module, card: ModelCard) -> Path:
    """A run's directory, and beside it a compact file and images, one of which is no image."""
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "best.ckpt", model, card=card.to_dict())
    save_compact(compact(load(tmp_path / "run")), tmp_path / "x.safetensors")
    directory = tmp_path / "images" / "deep"
    directory.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 24, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
    (directory / "note.txt").touch()
    return tmp_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would run: model, its options, the run's options and the name of the models."""
    seen: list[Any] = []

    def run(create: Any, model: dict[str, Any], options: Any, images: object, models: str | None, file: object) -> None:
        seen.append((create.__self__, model, options, models, file))

    monkeypatch.setattr("dnw_graph.training.runs.run", run)
    return seen


HELP = """
import sys, time, torch
from dnw_graph.cli import main
start = time.process_time()
try:
    main({argv})
finally:
    print(time.process_time() - start, "lightning" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["train", "--help"], ["predict", "--help"], ["export", "--help"]])
def test_help_takes_less_than_a_second_beside_pytorch_and_no_lightning(argv: list[str]):
    result = subprocess.run(
        [sys.executable, "-c", HELP.format(argv=argv)],
        capture_output=True,
        text=True,
        cwd=Path(dnw_graph.__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr
    seconds, lightning = result.stdout.splitlines()[-1].split()
    assert lightning == "False"
    assert float(seconds) < 1


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("train", "evaluate", "predict", "export", "info", "compare"):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'"),
        (["train", "--model", "resnet5"], "unknown model 'resnet5': did you mean 'resnet50'"),
        (["train", "--densty", "0.1", "--model", "resnet18"], "unknown option --densty: did you mean --density?"),
        (["train", "--config", "mobilenet_v1_dnw_x225"], "did you mean mobilenet_v1_dnw_x0.225"),
        (["train", "--init-from", "run", "--model", "resnet18"], "--model is 'resnet18', but run/best.ckpt holds"),
        (["evaluate", "run", "--model", "resnet18"], "--model is 'resnet18', but run/best.ckpt holds"),
        (["evaluate", "run", "--data", "digits", "--compile"], "--compile is for training, not for --evaluate"),
        (["evaluate", "run", "--data", "digits", "--wandb", "x"], "--wandb is for training, not for --evaluate"),
        (["evaluate"], "evaluate needs a model"),
        (["evaluate", "nowhere"], "'nowhere' does not exist"),
        (["evaluate", "x.safetensors"], "x.safetensors does not name its test images: give them with --data"),
        (["predict", "run"], "the following arguments are required: IMAGE"),
        (["predict", "run", "nothing.png"], "cannot read image nothing.png"),
        (["predict", "run", "run"], "run contains no images"),
        (["predict", "run", "images", "--top", "0"], "--top is 0"),
        (["export", "run", "x.txt"], "expected a file ending in"),
        (["export", "run", "x.safetensors", "--with-preprocessing"], "preprocessing can be part of .pt2 and .onnx"),
        (["info", "images/deep/0.png"], "0.png cannot be read"),
        (["compare", "--rules", "rigel"], "unknown wiring 'rigel': did you mean 'rigl'"),
        (["compare", "--rules", "dnw", "--wiring", "set"], "--wiring is set for every run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error


def test_train_knows_the_models_by_name_configuration_and_checkpoint(runs: list[Any], trained: Path):
    assert main(["train"]) == 0
    assert main(["train", "--model=resnet50", "--density", "0.2"]) == 0
    assert main(["train", "--model", "tiny_classifier", "--dynamics", "discrete"]) == 0
    assert main(["train", "--config", "tiny_static_rg", "--data", "digits"]) == 0
    assert main(["train", "--config", "resnet50_sparse_0.1"]) == 0
    assert main(["evaluate", "x.safetensors", "--data", "digits"]) == 0
    assert main(["evaluate", "run", "--data", "digits", "--workers", "0"]) == 0
    assert [models for *_, models, _ in runs] == [
        *("mobilenet", "resnet", "tiny", "tiny", "resnet", "mobilenet", "mobilenet")
    ]
    assert runs[1][0].density == 0.2
    assert isinstance(runs[2][0], TinyOptions)
    assert (runs[3][1]["wiring"], runs[3][2].batch_size) == ("random_graph", 512)
    assert (runs[4][1]["model"], runs[4][1]["density"]) == ("resnet50", 0.1)
    assert runs[5][2].evaluate == "x.safetensors"
    assert (runs[6][0].width, runs[6][0].wiring) == (0.1, "random_graph")


def test_a_configuration_names_models_as_the_command_line_does(
    tmp_path: Path, runs: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from test_command_line import TinyOptions as Own

    monkeypatch.setattr("dnw_graph.recipes.models.FAMILIES", dict(FAMILIES))
    register_models("mine", Own)
    Path("tiny.yaml").write_text("model: tiny_classifier\nwiring: random_graph\n")
    Path("mine.yaml").write_text("model: mine\nsize: 2.0\n")
    assert main(["train", "--config", "tiny.yaml"]) == 0
    assert main(["train", "--config", "mine.yaml"]) == 0
    assert [(type(options), models) for options, *_, models, _ in runs] == [(TinyOptions, "tiny"), (Own, "mine")]
    assert (runs[0][0].wiring, runs[1][0].size) == ("random_graph", 2.0)
    Path("tiny.yaml").write_text("model: tiny_classifire\n")
    assert main(["train", "--config", "tiny.yaml"]) == 2
    assert "unknown model 'tiny_classifire': did you mean 'tiny_classifier'" in capsys.readouterr().err


def test_the_configuration_of_a_run_names_its_model():
    assert main(["train", "--model", "tiny_classifier", "--epochs", "1", "--workers", "0", "--output", "1"]) == 0
    assert main(["train", "--config", "1/config.yaml", "--output", "2"]) == 0
    assert [yaml.safe_load(Path(name, "config.yaml").read_text())["model"] for name in "12"] == ["tiny_classifier"] * 2


def expected(model: nn.Module, path: Path) -> list[tuple[str, float]]:
    """The classes of an image with their probabilities, the most likely first."""
    with torch.no_grad():
        probabilities = model(PREPROCESS(Image.open(path)).unsqueeze(0)).softmax(1)[0].tolist()
    return sorted(zip(CLASSES, probabilities, strict=True), key=lambda pair: -pair[1])


@pytest.mark.parametrize("name", ["run", "x.safetensors"])
def test_predict_gives_classes_and_probabilities(
    name: str, trained: Path, model: nn.Module, capsys: pytest.CaptureFixture[str]
):
    path = trained / "images" / "deep" / "1.png"
    assert main(["predict", name, str(path), "--top", "2"]) == 0
    (first, p), (second, q), _ = expected(model, path)
    assert capsys.readouterr().out == f"{path}  {first} {p:.1%}  {second} {q:.1%}\n"


@pytest.mark.parametrize("baked", [(), ("--with-preprocessing",)], ids=["", "with preprocessing"])
@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_predict_runs_exports(
    ending: str,
    baked: tuple[str, ...],
    trained: Path,
    model: nn.Module,
    capsys: pytest.CaptureFixture[str],
    unchecked: None,
):
    file = f"x.{ending}"
    assert main(["export", "run", file, *baked]) == 0
    capsys.readouterr()
    assert main(["predict", file, "images", "--top", "2"]) == 0
    for path, *found in list(csv.reader(capsys.readouterr().out.splitlines()))[1:]:
        names, probabilities = zip(*expected(model, trained / path)[:2], strict=True)
        assert tuple(found[::2]) == names
        assert [float(x) for x in found[1::2]] == pytest.approx(probabilities, abs=2e-3)
    assert main(["predict", file, "images", "--wiring", "dnw"]) == 2
    assert capsys.readouterr().err == f"error: {file} is a program, which needs no rule: leave --wiring out\n"
    with pytest.raises(InputError, match=f"x.{ending} is an exported program, .* use dnw-graph predict"):
        load(file)


def test_programs_that_cannot_be_run_are_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unchecked: None
):
    from dnw_graph.compaction import programs

    card = load("run").card
    Path("torn.pt2").write_bytes(b"PK torn")
    for name, message in (("torn.pt2", "torn.pt2 cannot be run"), ("x.onnx", "install the extra dnw-graph")):
        monkeypatch.setattr(programs.importlib.util, "find_spec", lambda package: None)
        with pytest.raises(InputError, match=message):
            programs.load_program(Path(name), card)
    assert main(["predict", "torn.pt2", "images"]) == 2
    assert "torn.pt2 has no card that can be read" in capsys.readouterr().err


def test_a_command_reads_its_checkpoint_once(runs: list[Any], trained: Path, monkeypatch: pytest.MonkeyPatch):
    from dnw_graph import checkpoint, loading

    read: list[Path] = []
    reader = checkpoint.read_checkpoint
    monkeypatch.setattr(loading, "read_checkpoint", lambda path: read.append(path) or reader(path))
    for option in ("--resume", "--evaluate", "--init-from"):
        assert main(["train", option, "run/best.ckpt", "--data", "digits"]) == 0
    assert read == [Path("run/best.ckpt")] * 3
    assert [file.path for *_, file in runs] == read
    assert [options["width"] for _, options, *_ in runs] == [0.1] * 3  # of the file, as it was trained


@pytest.mark.parametrize("output", [(), ("--output", "x.csv")])
def test_predict_gives_csv_for_a_directory(
    output: tuple[str, ...], trained: Path, model: nn.Module, capsys: pytest.CaptureFixture[str]
):
    assert main(["predict", "run", "images", *output]) == 0
    text = Path("x.csv").read_text() if output else capsys.readouterr().out
    header, *rows = csv.reader(text.splitlines())
    assert header == ["image", *(f"{what}_{place}" for place in (1, 2, 3) for what in ("class", "probability"))]
    assert [row[0] for row in rows] == [f"images/deep/{number}.png" for number in range(3)]
    for path, *found in rows:
        names, probabilities = zip(*expected(model, trained / path), strict=True)
        assert tuple(found[::2]) == names
        assert [float(x) for x in found[1::2]] == pytest.approx(probabilities, abs=1e-4)


@pytest.mark.parametrize("output", [(), ("--output", "x.csv")])
def test_names_of_images_need_not_be_utf_8(output: tuple[str, ...], trained: Path, capfdbinary: Any):
    os.mkdir("odd")
    shutil.copy("images/deep/0.png", b"odd/\xff.png")
    command = [sys.executable, "-m", "dnw_graph.cli", "predict", "run", "odd", *output]
    assert subprocess.run(command, check=False).returncode == 0
    text = Path("x.csv").read_bytes() if output else capfdbinary.readouterr().out
    assert text.splitlines()[1].startswith(b"odd/\xff.png,")


@pytest.mark.parametrize("ending", ["safetensors", "pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_export_and_info(
    ending: str, trained: Path, card: ModelCard, capsys: pytest.CaptureFixture[str], unchecked: None
):
    assert main(["export", "run", f"y.{ending}"]) == 0
    assert capsys.readouterr().out.startswith(f"written to y.{ending}: ")
    for name in (f"y.{ending}", "run"):
        assert main(["info", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == card.to_dict()
        assert main(["info", name]) == 0
        printed = capsys.readouterr().out
        assert "classes     3: cat, dog, fish\n" in printed
        assert "images      shorter side to 20, centre of 16 × 16\n" in printed
        assert "metrics     top1 75.00%, step 9\n" in printed


def test_compare_trains_what_is_missing_and_makes_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    done: list[list[str]] = []

    def train(argv: list[str]) -> int:
        done.append(argv)
        if len(done) == 3:
            return 130
        directory = Path(argv[argv.index("--output") + 1])
        directory.mkdir(parents=True, exist_ok=True)
        names = ("top1", "top5", "best_top1", "parameters", "multiply_adds", "training_multiply_adds", "seconds")
        summary = {**dict.fromkeys(names, 0.5), "options": {"epochs": 3, "lr": 0.1, "held_out": 180}}
        (directory / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr("dnw_graph.cli.train", train)
    command = ["compare", "--rules", "dnw", "set", "--seeds", "0", "1", "--epochs", "3", "--init-from", "x.ckpt"]
    monkeypatch.setattr("dnw_graph.cli._requested", lambda words: {"epochs": int(words[1]), "held_out": None})
    assert main(command) == 130
    last = Path("runs/compare/set/seed0/last.ckpt")
    last.parent.mkdir(parents=True)
    write(last, nn.Module(), options={"epochs": 50, "held_out": 180})
    assert main(command) == 2
    assert f"--epochs is 3, but {last} was trained with 50: give the same value" in capsys.readouterr().err
    write(last, nn.Module(), options={"epochs": 3, "held_out": 180})
    assert main(command) == 0
    own = ["--wiring", "dnw", "--seed", "0", "--output", "runs/compare/dnw/seed0"]
    assert done[0] == ["--epochs", "3", "--init-from", "x.ckpt", *own]
    assert done[3][:2] == ["--resume", str(last)]
    assert "--init-from" not in done[3]
    assert len(done) == 5
    rows = list(csv.DictReader(Path("runs/compare/compare.csv").read_text().splitlines()))
    assert [(row["rule"], row["seed"]) for row in rows] == [("dnw", "0"), ("dnw", "1"), ("set", "0"), ("set", "1")]
    assert {row["held_out"] for row in rows} == {"180"}
    assert Path("runs/compare/compare.png").stat().st_size > 1000
    assert "| dnw | 2 | 50.00 ± 0.00 |" in capsys.readouterr().out
    assert main([*command[:8], "50"]) == 2
    assert "--epochs is 50, but runs/compare/dnw/seed0/summary.json was trained with 3" in capsys.readouterr().err
    assert main([*command, "--devices", "2"]) == 2
    assert "compare trains in one process" in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [False, True])
def test_compare_refuses_runs_whose_data_gave_an_option_another_value(
    stopped: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The images of the data set may have changed in between."""

    def train(argv: list[str]) -> int:
        directory = Path(argv[argv.index("--output") + 1])
        directory.mkdir(parents=True, exist_ok=True)
        summary = {**dict.fromkeys(COLUMNS, 0.5), "options": {"held_out": held_out, "train_images": 9 * held_out}}
        (directory / "summary.json").write_text(json.dumps(summary))
        return 0

    held_out = 180
    monkeypatch.setattr("dnw_graph.cli.train", train)
    monkeypatch.setattr("dnw_graph.cli._requested", lambda words: {"held_out": None})
    assert main(["compare", "--rules", "dnw", "--seeds", "0"]) == 0
    if stopped:
        last = Path("runs/compare/set/seed0/last.ckpt")
        last.parent.mkdir(parents=True)
        write(last, nn.Module(), options={"held_out": 190, "train_images": 9 * 190}, machine={"data": "digits"})
    held_out = 190
    capsys.readouterr()
    assert main(["compare", "--rules", "dnw", "set", "--seeds", "0"]) == 2
    told = "--held-out is 180 in runs/compare/dnw/seed0, but 190 in runs/compare/set/seed0"
    assert told in capsys.readouterr().err


def test_a_table_has_means_and_deviations_of_seeds():
    costs = {"multiply_adds": 2_000_000, "training_multiply_adds": 3e12}
    rows = [{"rule": "dnw", "top1": top1, **costs} for top1 in (0.5, 0.6)]
    # The deviation of a sample of two is their distance over √2.
    assert table(rows)[2] == "| dnw | 2 | 55.00 ± 7.07 | 2.0 M | 3 T |"


def test_a_model_of_a_program_of_its_own_is_told(tmp_path: Path, model: nn.Module, card: ModelCard, capsys: Any):
    content = {**card.to_dict(), "models": None}
    write(tmp_path / "x.ckpt", model, card=content)
    assert main(["evaluate", "x.ckpt"]) == 2
    assert "was trained by another program: resume with that program" in capsys.readouterr().err
    with pytest.raises(InputError, match="register them"):
        load(tmp_path / "x.ckpt")
    write(tmp_path / "x.ckpt", model, card={**content, "models": "of mine"})
    assert main(["evaluate", "x.ckpt"]) == 2
    assert "has models 'of mine': use the program that calls register_models" in capsys.readouterr().err


def test_predictions_are_written_as_they_come(trained: Path, capsys: pytest.CaptureFixture[str]):
    images = [f"images/deep/{number}.png" for number in range(3)]
    assert main(["predict", "run", *images, "--output", "none/x.csv"]) == 2
    assert (
        capsys.readouterr().err == "error: cannot write none/x.csv (No such file or directory): give another --output\n"
    )
    Path("images/deep/2.png").write_bytes(b"no image")
    assert main(["predict", "run", *(images[:2] * 16), images[2], "--output", "x.csv"]) == 2
    assert "2.png" in capsys.readouterr().err
    assert len(Path("x.csv").read_text().splitlines()) == 1 + 32


class Own(RandomGraph):
    """A rule of one's own."""


def test_a_rule_by_its_path_is_named_on_the_command_line(trained: Path, card: ModelCard, capsys: Any, unchecked: None):
    path = f"{Own.__module__}.Own"
    model = MobileNetOptions(width=0.1, wiring=path).create(3, 16).eval()
    write(Path("own.ckpt"), model, card={**card.to_dict(), "options": {**OPTIONS, "wiring": path}})
    image = trained / "images" / "deep" / "1.png"
    for command in (["predict", "own.ckpt", str(image)], ["export", "own.ckpt", "own.safetensors"]):
        assert main(command) == 2
        assert f"trained with the rule '{path}', which is not registered here" in capsys.readouterr().err
        assert main([*command, "--wiring", "set"]) == 2
        assert f"error: --wiring is 'set', but own.ckpt was trained with '{path}'" in capsys.readouterr().err
        assert main([*command, "--wiring", path]) == 0
        capsys.readouterr()
    main(["predict", "own.ckpt", str(image), "--wiring", path, "--top", "1"])
    name, probability = expected(model, image)[0]
    assert capsys.readouterr().out == f"{image}  {name} {probability:.1%}\n"
