"""The example of sparse ResNets, from its command line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
import yaml
from torch import Tensor, nn
from torch_geometric.data import Data

from dnw_graph import InputError, SparseMomentum, load
from dnw_graph.sparse_layers import weight_graphs
from dnw_graph.training import Classifier, cosine, read_checkpoint

EXAMPLE = "imagenet_resnet50"
EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("--image-size=8", "--batch-size=64", "--epochs=3", "--accelerator=cpu", "--lr=0.05", "--held-out=0")
# Convolutions of ResNet-18 and its classifier for 10 classes.
WEIGHTS_18 = 11_172_032

pytestmark = pytest.mark.usefixtures("few_digits")


class Narrow(torchvision.models.ResNet):
    """ResNet with one block per stage and a sixteenth of the channels, so that runs are short."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.inplanes = 4
        for stage, width in enumerate((4, 8, 16, 32), start=1):
            block = torchvision.models.resnet.BasicBlock
            setattr(self, f"layer{stage}", self._make_layer(block, width, 1, stride=1 if stage == 1 else 2))
        self.fc = nn.Linear(32, num_classes)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights, num_classes: Narrow(num_classes))


# Steps 0 … 5 in epochs of two: stopped in the middle of an epoch, and at the end of one, before its round.
@pytest.mark.usefixtures("narrow")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("wiring", "last_step"),
    [("dnw", 2), ("sparse_momentum", 2), ("sparse_momentum", 3), ("targeted_dropout", 3)],
)
def test_training_resume_and_evaluation(
    wiring: str,
    last_step: int,
    start: Callable[..., int],
    stopping_at: Callable[[int], AbstractContextManager[None]],
    capsys: pytest.CaptureFixture[str],
):
    options = (*SHORT, "--wiring", wiring)
    assert start(*options, "--output", "unbroken") == 0
    with stopping_at(last_step):
        assert start(*options, "--output", "broken") == 143
    assert start(*options, "--resume", "broken/last.ckpt") == 0
    summaries = [json.loads(Path(run, "summary.json").read_text()) for run in ("unbroken", "broken")]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}
    weights = [read_checkpoint(Path(run, "last.ckpt"))["state_dict"] for run in ("unbroken", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    capsys.readouterr()
    assert start(*options, "--evaluate", "broken/last.ckpt") == 0
    assert f"top-1          {summaries[0]['top1']:.2%}\n" in capsys.readouterr().out
    assert start(*options, "--density", "0.3", "--evaluate", "broken/last.ckpt") == 2
    assert "--density is 0.3, but broken/last.ckpt was trained with 0.1" in capsys.readouterr().err


@pytest.mark.usefixtures("narrow")
def test_sparse_momentum_moves_weights_and_keeps_their_number(start: Callable[..., int]):
    assert start(*SHORT, "--wiring", "sparse_momentum", "--output", "run") == 0
    kept = []
    for file in ("first.ckpt", "last.ckpt"):
        state = read_checkpoint(Path("run", file))["state_dict"]
        kept.append({name: value for name, value in state.items() if name.endswith("wiring.real")})
    assert len(kept[0]) == 13  # the stem, two convolutions and a shortcut per stage but the first, the classifier
    first, last = ({name: int(mask.sum()) for name, mask in each.items()} for each in kept)
    assert sum(first.values()) == sum(last.values())
    assert first != last
    summary = json.loads(Path("run/summary.json").read_text())
    assert sorted(layer["kept"] for layer in summary["weights"].values()) == sorted(last.values())
    for layer in summary["weights"].values():
        assert layer["density"] == layer["kept"] / layer["weights"]


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_a_run_leaves_the_graph_of_every_layer(start: Callable[..., int]):
    """One ranking of all layers, so that the numbers of edges differ from layer to layer."""
    assert start(*SHORT, "--distribution", "global", "--output", "run") == 0
    ending = ".parametrizations.weight.original"
    state = read_checkpoint(Path("run/last.ckpt"))["state_dict"]
    weights = {
        name.removeprefix("model.").removesuffix(ending) + ".weight": value
        for name, value in state.items()
        if name.endswith(ending)
    }
    strengths = torch.cat([weight.abs().flatten() for weight in weights.values()]).sort(descending=True).values
    kept = len(strengths) - len(strengths) * 9 // 10
    summary = json.loads(Path("run/summary.json").read_text())["weights"]
    assert summary.keys() == weights.keys()
    assert {path.name for path in Path("run/wiring").iterdir()} == {f"{name}.pt" for name in weights}
    edges = 0
    for name, weight in weights.items():
        data = Data.from_dict(torch.load(Path("run/wiring", f"{name}.pt"), weights_only=True))
        assert data.validate()
        found = torch.zeros_like(weight)
        target = data.edge_index[1] - weight.size(1)
        found[(target, data.edge_index[0], *data.kernel_position.T[5 - weight.dim() :])] = data.edge_weight
        assert torch.equal(found, weight * (weight.abs() >= strengths[kept - 1])), name
        assert summary[name]["kept"] == data.num_edges
        assert summary[name]["density"] == data.num_edges / weight.numel()
        edges += data.num_edges
    assert edges == kept


@pytest.mark.usefixtures("narrow")
def test_a_dense_run_leaves_no_graphs(start: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    assert start(*SHORT, "--density", "1", "--output", "run") == 0
    assert not Path("run/wiring").exists()
    assert "wiring" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("narrow", "unchecked")
def test_compact_evaluation_and_export(
    example: ModuleType,
    start: Callable[..., int],
    scores_of_file: Callable[[Path, Tensor], Tensor],
    capsys: pytest.CaptureFixture[str],
):
    assert start(*SHORT, "--output", "run") == 0
    checkpoint = Path("run/last.ckpt")
    model = example.ResNetOptions().create(10, 8).eval()
    state = read_checkpoint(checkpoint)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items() if "model." in name})
    images = torch.rand(5, 3, 8, 8)
    evaluate = (*SHORT, "--evaluate", str(checkpoint))
    capsys.readouterr()
    for arguments in ((), ("--compact", "--export", "w.pt2"), ("--export", "w.onnx")):
        assert start(*evaluate, *arguments) == 0
        printed = capsys.readouterr().out
        top1 = json.loads(Path("run/summary.json").read_text())["top1"]
        assert f"top-1          {top1:.2%}\n" in printed
        for path in map(Path, arguments[-1:]):
            assert f"written to {path}" in printed
            torch.testing.assert_close(scores_of_file(path, images), model(images).detach(), rtol=1e-4, atol=1e-4)
    # A program that asks this process for the masks would work here alone.
    assert "real_masks" not in str(torch.export.load("w.pt2").graph)
    assert start(*evaluate, "--export", "w.safetensors") == 0
    torch.testing.assert_close(load("w.safetensors")(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_second_stages_start_from_a_complete_network(start: Callable[..., int]):
    assert start(*SHORT, "--wiring", "complete", "--output", "complete") == 0
    ends = {
        "fine_tune": read_checkpoint(Path("complete/last.ckpt"))["state_dict"],
        "lottery_ticket": read_checkpoint(Path("complete/first.ckpt"))["state_dict"],
    }
    trained = ends["fine_tune"]["model.layer1.0.conv1.parametrizations.weight.original"].abs().flatten()
    strongest = trained.topk(15).indices.sort().values  # 144 - ⌊0.9 · 144⌋
    for rule, state in ends.items():
        assert start(*SHORT, "--wiring", rule, "--complete", "complete", "--output", rule) == 0
        first = read_checkpoint(Path(rule, "first.ckpt"))["state_dict"]
        assert all(torch.equal(first[name], value) for name, value in state.items() if name.endswith("original"))
        index = next(v for name, v in first.items() if name.startswith("model.layer1.0.conv1.") and "index" in name)
        assert torch.equal(index, strongest)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_rounds_come_between_epochs(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch):
    steps = []
    monkeypatch.setattr(SparseMomentum, "exchange", lambda self, view, *_: steps.append((view.step, view.num_steps)))
    assert start(*SHORT, "--wiring", "sparse_momentum", "--output", "run") == 0
    assert sorted({*steps}) == [(2, 6), (4, 6)]  # three epochs of two steps; no round follows the last one


@pytest.mark.usefixtures("narrow")
def test_options_of_the_recipe_reach_the_training(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch):
    seen = []

    def train(module: Classifier, *others: object) -> None:
        seen.append((module.label_smoothing, module.norm_weight_decay, module.momentum, module.weight_decay))
        raise InputError("seen")

    monkeypatch.setattr(sys.modules["dnw_graph.training.runs"], "_train", train)
    options = ("--label-smoothing", "0.3", "--norm-weight-decay", "--momentum", "0.6", "--weight-decay", "0.01")
    assert start(*SHORT) == start(*SHORT, *options) == 2
    assert seen == [(0.1, False, 0.875, 2**-15), (0.3, True, 0.6, 0.01)]


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_the_learning_rate_of_a_run_warms_up(start: Callable[..., int]):
    assert start(*SHORT, "--warmup-epochs", "2", "--batch-size", "32", "--epochs", "4", "--output", "run") == 0
    lines = Path("run/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/lr")
    found = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    # Epochs of 5 steps; the logs have the last one of each: 5 and 10 of 10 steps up, then 5th and 10th of 10 down.
    fall = [0.05 * (1 + math.cos(math.pi * t / 10)) / 2 for t in (4, 9)]
    assert found == pytest.approx([0.025, 0.05, *fall])


def test_what_is_kept(example: ModuleType):
    model = example.ResNetOptions().create(10, 16)
    counts = {name: (graph.num_candidates, graph.num_real_edges) for name, graph in weight_graphs(model).items()}
    # 20 convolutions and a classifier, each with n - ⌊0.9 n⌋ weights: for n = 9,408 that is 9,408 - 8,467.
    assert len(counts) == 21
    assert counts["conv1.weight"] == (9408, 941)
    assert counts["fc.weight"] == (5120, 512)
    assert counts["layer4.1.conv2.weight"] == (512 * 512 * 9, 235_930)
    assert sum(n for n, _ in counts.values()) == WEIGHTS_18
    first_dense = example.ResNetOptions(first_layer_dense=True).create(10, 16)
    assert {name: c for name, c in counts.items() if name != "conv1.weight"} == {
        name: (graph.num_candidates, graph.num_real_edges) for name, graph in weight_graphs(first_dense).items()
    }
    kernel = example.ResNetOptions(distribution="erdos_renyi_kernel").create(10, 16)
    assert sum(graph.num_real_edges for graph in weight_graphs(kernel).values()) == WEIGHTS_18 - WEIGHTS_18 * 9 // 10
    assert not weight_graphs(example.ResNetOptions(density=1.0).create(10, 16))


def test_two_of_four_decides_how_many_weights_are_kept(example: ModuleType):
    options = example.ResNetOptions(wiring="nm", first_layer_dense=True)
    graphs = weight_graphs(options.create(10, 16))
    assert all(2 * graph.num_real_edges == graph.num_candidates for graph in graphs.values())
    one_of_four = example.ResNetOptions(wiring="nm", wiring_options={"n": 1}).create(10, 16)
    kept = weight_graphs(one_of_four)["conv1.weight"].num_real_edges
    assert kept == 64 * 7 * 7  # of three input channels, at every place of the kernel
    assert options.identity()["density"] is None
    assert example.ResNetOptions().identity()["density"] == 0.1
    with pytest.raises(InputError, match="leave num_edges or density out"):
        example.ResNetOptions(wiring="nm", density=0.1).create(10, 16)


def test_dense_resnet50_is_that_of_torchvision_with_kaiming_weights(example: ModuleType):
    model = example.ResNetOptions(model="resnet50", density=1.0).create(1000, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert model.conv1.stride == (2, 2)
    assert model.layer2[0].conv1.stride == (1, 1)
    assert model.layer2[0].conv2.stride == (2, 2)  # v1.5
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            # Standard deviation √(2 / fan-in), and its own spread over n normal draws, 1 / √(2n) of it.
            spread = 5 / math.sqrt(2 * layer.weight.numel())
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=spread)
            assert layer.weight.abs().max() > 3 * layer.weight.std()  # not uniform
    small = example.ResNetOptions(density=1.0).create(10, 32)
    assert small.conv1.stride == (1, 1)


def test_the_recipe_of_the_paper_reaches_the_run(
    example: ModuleType, start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
):
    seen = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    config = str(EXAMPLES / "configs" / "resnet50_first_dense_0.1.yaml")
    assert start("--config", config, "--data", "/path/to/imagenet") == 0
    _, model, options, *_ = seen[0]
    assert (model["model"], model["density"], model["first_layer_dense"], model["wiring"]) == (
        "resnet50",
        0.1,
        True,
        "dnw",
    )
    recipe = {
        "epochs": 100,
        "batch_size": 256,
        "lr": 0.256,
        "schedule": "cosine",
        "warmup_epochs": 5,
        "momentum": 0.875,
        "weight_decay": 2**-15,
        "norm_weight_decay": False,
        "label_smoothing": 0.1,
        "image_size": 224,
    }
    assert {name: getattr(options, name) for name in recipe} == recipe


def test_no_weight_decay_on_the_norms_of_a_sparse_resnet(example: ModuleType):
    model = example.ResNetOptions().create(10, 16)
    module = Classifier(model, 10, cosine(1), 0.1, 0.875, 2**-15, seed=0, norm_weight_decay=False)
    groups = module.configure_optimizers()["optimizer"].param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    # 20 norms with weight and bias; 20 convolutions, the classifier and its bias.
    assert sorted(decay.values()) == [0.0] * 40 + [2**-15] * 22
    assert all(parameter.dim() == 1 for parameter, value in decay.items() if not value)
    assert decay[model.fc.bias] == 2**-15


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model", "resnet5"), "did you mean 'resnet50'"),
        (("--density", "0"), "density"),
        (("--density", "1.5"), "density"),
        (("--wiring", "sparse_momemtum"), "did you mean 'sparse_momentum'"),
        (("--wiring", "sparse_momentum", "--wiring-options.prune_rate", "2.5"), "prune_rate must be a share"),
        (("--wiring", "sparse_momentum", "--wiring-options.rate", "0.2"), "unknown option of wiring"),
        (("--wiring", "sparse_momentum", "--complete", "runs/1"), "--complete goes with --wiring lottery_ticket"),
        (("--wiring", "sparse_momentum", "--density", "1"), "give a --density below 1"),
        (("--first-layer-dense", "--density", "1"), "give a --density below 1"),
        (("--distribution", "unifrom"), "did you mean 'uniform'"),
        (("--momentum", "0", "--wiring", "sparse_momentum"), "SGD has no momentum for model.conv1.weight"),
        (("--epochs", "1", "--warmup-epochs", "1"), "--warmup-epochs is 1, --epochs 1: give more --epochs"),
    ],
)
def test_bad_input(start: Callable[..., int], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str):
    assert start("--image-size=8", "--batch-size=64", "--epochs=2", "--accelerator=cpu", *argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("resnet50_*.yaml")), ids=lambda path: path.stem)
def test_configurations_name_options_that_exist(path: Path, start: Callable[..., int], monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    assert start("--config", str(path)) == 0
    given = yaml.safe_load(path.read_text())
    assert {**seen[0][1], **vars(seen[0][2])} == {**seen[0][1], **vars(seen[0][2]), **given}
