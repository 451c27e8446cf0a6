"""The example, from its command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from pairs import rest_is_slow
from torch import Tensor, nn

from dnw_graph import InputError
from dnw_graph.data.sources import digits
from dnw_graph.data.transforms import transforms
from dnw_graph.recipes.models import FAMILIES
from dnw_graph.training import read_checkpoint
from dnw_graph.training.command_line import read_options
from dnw_graph.training.resuming import check_same_run

EXAMPLE = "imagenet_mobilenet"
EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = (
    *("--image-size", "8", "--batch-size", "32", "--epochs", "1", "--accelerator", "cpu", "--width", "0.1"),
    *("--held-out", "0"),
)

# Rows of Table 3: model, width, further options.
TABLE_3 = {
    "mobilenet_v1_x0.25": ("mobilenet_v1", 0.25, {}),
    "mobilenet_v1_x0.5": ("mobilenet_v1", 0.5, {}),
    "mobilenet_v1_rg_x0.225": ("mobilenet_v1_dnw", 0.225, {"wiring": "random_graph"}),
    "mobilenet_v1_rg_x0.49": ("mobilenet_v1_dnw", 0.49, {"wiring": "random_graph"}),
    "mobilenet_v1_dnw_small_x0.15": ("mobilenet_v1_dnw", 0.15, {"small": True}),
    "mobilenet_v1_dnw_small_x0.225": ("mobilenet_v1_dnw", 0.225, {"small": True}),
    "mobilenet_v1_dnw_x0.225": ("mobilenet_v1_dnw", 0.225, {}),
    "mobilenet_v1_dnw_x0.3": ("mobilenet_v1_dnw", 0.3, {}),
    "mobilenet_v1_dnw_x0.49": ("mobilenet_v1_dnw", 0.49, {}),
}

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.mark.slow
def test_training_resume_and_evaluation(
    start: Callable[..., int],
    stopping_at: Callable[[int], AbstractContextManager[None]],
    capsys: pytest.CaptureFixture[str],
):
    assert start(*SHORT, "--output", "unbroken") == 0
    printed = capsys.readouterr().out
    assert "real edges     31,393\n" in printed
    names = [f"wiring/stage{number}.{ending}" for number in range(1, 6) for ending in ("png", "pt")]
    for name in ("summary.json", "metrics.csv", "first.ckpt", "last.ckpt", "best.ckpt", *names):
        assert Path("unbroken", name).is_file(), name

    with stopping_at(2):
        assert start(*SHORT, "--output", "broken") == 143
    assert "stopped after step 3: continue with --resume broken/last.ckpt" in capsys.readouterr().err
    assert start(*SHORT, "--resume", "broken/last.ckpt") == 0
    summaries = [json.loads(Path(run, "summary.json").read_text()) for run in ("unbroken", "broken")]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}
    weights = [read_checkpoint(Path(run, "last.ckpt"))["state_dict"] for run in ("unbroken", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    capsys.readouterr()
    assert start(*SHORT, "--evaluate", "broken/last.ckpt") == 0
    assert f"top-1          {summaries[0]['top1']:.2%}\n" in capsys.readouterr().out
    assert start(*SHORT, "--width", "0.2", "--evaluate", "broken/last.ckpt") == 2
    assert capsys.readouterr().err == (
        "error: --width is 0.2, but broken/last.ckpt was trained with 0.1: give the same value, or start a new run\n"
    )


@pytest.fixture(scope="module")
def trained(example: ModuleType, few_digits: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a short run."""
    directory = tmp_path_factory.mktemp("trained")
    assert example.run_example((*SHORT, "--output", str(directory))) == 0
    return directory / "last.ckpt"


@pytest.mark.parametrize("ending", rest_is_slow(["safetensors", "pt2", "onnx"]))
def test_compact_evaluation_and_export(
    ending: str,
    trained: Path,
    example: ModuleType,
    start: Callable[..., int],
    scores_of_file: Callable[[Path, Tensor], Tensor],
    capsys: pytest.CaptureFixture[str],
    unchecked: None,
):
    assert start(*SHORT, "--evaluate", str(trained)) == 0
    whole = capsys.readouterr().out
    assert start(*SHORT, "--evaluate", str(trained), "--compact", "--export", f"w.{ending}") == 0
    compacted = capsys.readouterr().out
    top1, compact_top1 = (re.search(r"top-1 +(\S+)%", printed) for printed in (whole, compacted))
    assert top1 is not None
    assert compact_top1 is not None
    assert abs(float(top1[1]) - float(compact_top1[1])) < 2.3  # rounding may turn one image of 45
    assert "outputs differ by" in compacted
    assert "outputs differ by" not in whole
    assert f"written to w.{ending}" in compacted

    model = example.MobileNetOptions(width=0.1).create(10, 8).eval()
    state = read_checkpoint(trained)["state_dict"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items() if "model." in key})
    data = digits()
    images = torch.stack([transforms("digits", 8)[1](data.test.load(index)) for index in range(5)])
    with torch.no_grad():
        torch.testing.assert_close(scores_of_file(Path(f"w.{ending}"), images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--compact",), "--compact and --export go with --evaluate"),
        (("--export", "w.onnx"), "--compact and --export go with --evaluate"),
        (("--evaluate", "CKPT", "--export", "w.onx"), "expected a file ending in .safetensors, .pt2, .onnx"),
        (("--evaluate", "CKPT", "--export", "nowhere/w.onnx"), "the directory nowhere does not exist"),
        (("--evaluate", "CKPT", "--export", ""), "--export must be a path; got ''"),
    ],
)
def test_bad_exports(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], trained: Path, argv: tuple[str, ...], message: str
):
    assert start(*SHORT, *(word.replace("CKPT", str(trained)) for word in argv)) == 2
    assert message in capsys.readouterr().err


def test_mobilenet_v1_trains(start: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    assert start(*SHORT, "--model", "mobilenet_v1") == 0
    assert "edges" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "mobilenet_v1_dwn"), "did you mean 'mobilenet_v1_dnw'"),
        (("--wiring", "dnv"), "did you mean 'dnw'"),
        (("--width", "0"), "width must be a positive number"),
        (("--width", "-1"), "width must be a positive number"),
        (("--model", "mobilenet_v1", "--small"), "--small"),
        (("--model", "mobilenet_v1", "--wiring", "random_graph"), "--wiring"),
        (("--model", "mobilenet_v1", "--node-norm-eps", "1e-3"), "--node-norm-eps"),
        (("--node-norm-eps", "0"), "eps of a norm must be above 0"),
    ],
)
def test_bad_models(start: Callable[..., int], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str):
    assert start(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_every_row_of_table_3_has_a_configuration():
    assert {path.stem for path in (EXAMPLES / "configs").glob("*.yaml")} >= set(TABLE_3)


@pytest.mark.parametrize("name", TABLE_3)
def test_configurations_are_those_of_the_paper(
    name: str,
    example: ModuleType,
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    config = EXAMPLES / "configs" / f"{name}.yaml"
    model, width, further = TABLE_3[name]
    schedule = {"epochs": 250, "batch_size": 512, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-5, "image_size": 224}
    schedule |= {"warmup_epochs": 0, "held_out": 0}
    assert yaml.safe_load(config.read_text()) == {
        "model": model,
        "width": width,
        "data": "imagenet",
        **({"node_norm_eps": 1e-5} if model == "mobilenet_v1_dnw" else {}),
        **schedule,
        **further,
    }
    assert start("--config", str(config)) == 2
    assert "data directory 'imagenet' does not exist" in capsys.readouterr().err

    seen = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    assert start("--config", str(config), "--data", "/path/to/imagenet") == 0
    options = seen[0][2]
    assert {key: getattr(options, key) for key in schedule} == schedule
    assert options.schedule == "cosine"
    assert options.data == "/path/to/imagenet"


def test_eps_of_the_norms_of_nodes(example: ModuleType):
    for options, eps in (({}, 1e-3), ({"node_norm_eps": 1e-5}, 1e-5)):
        chosen = example.MobileNetOptions(width=0.1, **options)
        assert chosen.identity()["node_norm_eps"] == eps
        model = chosen.create(10, 8)
        assert {norm.eps for norm in model.stages.modules() if isinstance(norm, nn.BatchNorm2d)} == {eps}


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_configurations_have_neither_a_larger_eps_nor_a_warm_up(path: Path):
    """The default of every other run is both; ResNet-50 has a warm-up in the paper."""
    if path.stem.startswith("resnet50"):
        pytest.skip("no norms of nodes")
    family = FAMILIES["tiny" if path.stem.startswith("tiny") else "mobilenet"]
    default, *_ = read_options("", family.options, family.defaults, [])
    assert (default.identity()["node_norm_eps"], family.defaults.warmup_epochs) == (1e-3, 1)
    model, run, _ = read_options("", family.options, family.defaults, ["--config", str(path)])
    remedy = path.stem.endswith("eps_warmup") or path.stem.startswith("recipe")
    assert (model.identity()["node_norm_eps"], run.warmup_epochs) == ((1e-3, 5) if remedy else (1e-5, 0))


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_configurations_alone_keep_all_training_images(path: Path):
    options = yaml.safe_load(path.read_text())
    assert (options["held_out"] == 0) == (not path.stem.startswith("recipe"))
    assert all(family.defaults.held_out is None for family in FAMILIES.values())


def test_checkpoints_from_before_that_option_are_taken():
    names = ["width", "node_norm_eps"]
    check_same_run("last.ckpt", {"width": 0.1}, {"width": 0.1, "node_norm_eps": 1e-5}, names)
    with pytest.raises(InputError, match=r"--node-norm-eps is 0.001, but last.ckpt was trained with 1e-05"):
        check_same_run("last.ckpt", {"width": 0.1}, {"width": 0.1, "node_norm_eps": 1e-3}, names)


def test_the_stem_keeps_the_size_of_small_images(example: ModuleType):
    for size, stride in ((32, 1), (63, 1), (64, 2), (224, 2)):
        model = example.MobileNetOptions(model="mobilenet_v1", width=0.1).create(10, size)
        assert model.stem[0].stride == (stride, stride)
