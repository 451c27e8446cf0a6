"""Trained models of the package: their table, their files, and what can be done with them."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel

import dnw_graph
from dnw_graph import InputError, attach, sparsify
from dnw_graph.analysis.cost import cost, neural_graphs
from dnw_graph.cli import main
from dnw_graph.compaction import compact, export, save_compact
from dnw_graph.loading import ModelFile
from dnw_graph.model_card import ModelCard
from dnw_graph.models import create_model
from dnw_graph.models.pretrained import FOLDER
from dnw_graph.preprocessing import Preprocessing
from dnw_graph.recipes.models import MobileNetOptions
from dnw_graph.weights_file import save_weights

ROOT = Path(__file__).parents[2]
NAMES = [each.name for each in dnw_graph.pretrained()]
PREPROCESS = Preprocessing(16, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def trained(wiring: str = "dnw", **options: object) -> nn.Module:
    """A small model with a card, whose norms have seen something, and its weights as after training."""
    chosen = MobileNetOptions(width=0.1, wiring=wiring, **options)  # type: ignore[arg-type]
    model = chosen.create(3, 16)
    model(torch.randn(4, 3, 16, 16))
    card = ModelCard(PREPROCESS, ["a", "b", "c"], "mobilenet", {**chosen.identity(), "image_size": 16})
    card.describe(model)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.parametrize("each", dnw_graph.pretrained(), ids=NAMES)
def test_the_table_says_what_is_in_the_files(each: dnw_graph.models.Pretrained, offline: None):
    assert each.path.stat().st_size == each.file_size <= 1_500_000
    model = create_model(each.name, pretrained=True)
    assert not model.training
    size = model.preprocess.image_size
    costs = cost(model, (3, size, size))
    assert (costs.parameters, costs.multiply_adds) == (each.parameters, each.multiply_adds)
    assert model(torch.randn(2, 3, size, size)).shape == (2, len(model.classes))
    assert each.command.startswith("dnw-graph train ")
    assert "--model mobilenet_v1_dnw" in each.command
    assert 0.1 < each.top1 < 1
    assert all(len(set(name)) > 1 and not name.isdigit() for name in model.classes)
    assert each.name in str(dnw_graph.pretrained())
    cells = (f"`{each.name}`", each.data, f"{each.top1:.1%}", each.trained.removesuffix(" epochs"))
    numbers = (f"{number:,}" for number in (each.parameters, each.multiply_adds, each.file_size))
    assert f"| {' | '.join((*cells, *numbers))} |" in (ROOT / "docs" / "models.md").read_text()


def test_a_name_without_its_data_is_the_first_one():
    whole = create_model("mobilenet_v1_dnw", pretrained=True)
    named = create_model("mobilenet_v1_dnw.cifar10", pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), named.parameters(), strict=True))
    assert named.classes[:2] == ["airplane", "automobile"]
    loaded = dnw_graph.load("mobilenet_v1_dnw.cifar10")
    assert loaded.card == named.card


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mobilenet_v1_dnv", {}, "unknown pretrained model 'mobilenet_v1_dnv': did you mean 'mobilenet_v1_dnw"),
        ("mobilenet_v1_dnw", {"num_classes": 5}, "keeps the options it was trained with: leave out num_classes"),
    ],
)
def test_what_is_not_there_is_refused(name: str, options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        create_model(name, pretrained=True, **options)


@pytest.mark.parametrize("wiring", ["dnw", "random_graph", "rigl", "complete"])
def test_a_file_holds_the_model_bit_for_bit(wiring: str, images: Tensor, tmp_path: Path):
    model = trained(wiring)
    save_weights(model, tmp_path / "model.safetensors")
    again = dnw_graph.load(tmp_path / "model.safetensors")
    assert torch.equal(again(images), model(images))
    assert again.card == model.card
    graphs = zip(neural_graphs(model).values(), neural_graphs(again).values(), strict=True)
    for old, new in graphs:
        assert torch.equal(new.edge_index, old.edge_index)
        assert torch.equal(new.edge_weight, old.edge_weight)
        assert int((new.candidates.weight != 0).sum()) <= old.num_real_edges
    for name, value in model.state_dict().items():
        if not name.endswith("candidates.weight"):
            assert torch.equal(value, again.state_dict()[name]), name


def test_what_was_loaded_is_trained_on(images: Tensor, tmp_path: Path):
    """Hallucinated edges start at zero, and some of them become real."""
    save_weights(trained(), tmp_path / "model.safetensors")
    model = dnw_graph.load(tmp_path / "model.safetensors").train()
    before = {name: set(graph.real_index.tolist()) for name, graph in neural_graphs(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    attach(model, optimizer, 5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {name: set(graph.real_index.tolist()) for name, graph in neural_graphs(model).items()}
    assert any(after[name] - before[name] for name in before)


def test_a_file_that_was_changed_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_weights(trained(), path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="does not hold what was written"):
        dnw_graph.load(path)
    path.write_bytes(bytes(content[:-10]))
    with pytest.raises(InputError, match="it is damaged"):
        dnw_graph.load(path)


def test_a_model_that_does_not_say_how_it_is_made_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="has no card with options"):
        save_weights(create_model("mobilenet_v1", width=0.1), tmp_path / "model.safetensors")


# The hub


@pytest.fixture
def hub():
    pytest.importorskip("huggingface_hub")
    import dnw_graph.hub

    return dnw_graph.hub


@pytest.mark.parametrize("small", [False, True], ids=["whole", "compact"])
def test_a_directory_for_the_hub(small: bool, hub, images: Tensor, tmp_path: Path, offline: None):
    model = trained()
    kept = compact(model) if small else model
    hub.save_pretrained(kept, tmp_path / "repository")
    again = hub.from_pretrained(tmp_path / "repository")
    assert type(again) is type(kept)
    assert relative_error(again(images), model(images)) < 1e-5
    assert again.card == model.card
    text = (tmp_path / "repository" / "README.md").read_text()
    for part in (
        "library_name: dnw_graph",
        "pipeline_tag: image-classification",
        "3 classes: a, b, c",
        "| width | 0.1 |",
    ):
        assert part in text


def test_what_goes_to_the_hub_and_comes_from_it(hub, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The two calls of huggingface_hub that use the network are replaced by a directory."""
    from huggingface_hub import HfApi, hub_mixin

    class Created:
        repo_id = "user/model"

    def upload(self: object, repo_id: str, folder_path: str, **options: object) -> str:
        shutil.copytree(folder_path, tmp_path / "remote")
        return f"https://huggingface.co/{repo_id}"

    def download(repo_id: str, filename: str, **options: object) -> str:
        assert (repo_id, options["revision"]) == ("user/model", "v1")
        return str(tmp_path / "remote" / filename)

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **options: Created())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", download, raising=False)
    model = trained()
    assert hub.push_to_hub(model, "user/model") == "https://huggingface.co/user/model"
    assert {path.name for path in (tmp_path / "remote").iterdir()} >= {"README.md", "model.safetensors"}
    (tmp_path / "remote" / "config.json").write_text("{}")
    assert torch.equal(hub.from_pretrained("user/model", revision="v1")(images), model(images))


def test_no_repository_is_created_for_a_model_that_cannot_be_written(hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi

    created: list[object] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **options: created.append(args))
    with pytest.raises(InputError):
        hub.push_to_hub(torch.nn.Linear(2, 2), "user/model")
    assert not created


@pytest.mark.parametrize("of_the_client", [True, False])
def test_without_a_network_the_hub_is_an_input_error(of_the_client: bool, hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def unreachable(*args: object, **options: object) -> None:
        raise (HfHubHTTPError.__bases__[0] if of_the_client else ConnectionError)("no network")

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match="cannot be uploaded"):
        hub.push_to_hub(trained(), "user/model")
    with pytest.raises(InputError, match="no repository on the hub"):
        hub.from_pretrained("user/model")


def test_a_sparse_model_goes_to_the_hub_and_a_second_one_replaces_its_page(hub, images: Tensor, tmp_path: Path):
    model = trained()
    sparsify(model.classifier, 0.5, "random_graph")
    model.classifier.eval()
    HubModel = hub.HubModel  # noqa: N806
    HubModel(model).save_pretrained(tmp_path)  # `load` creates its model without sparse layers
    replace(model.card, classes=["d", "e", "f"]).describe(model)
    HubModel(model).save_pretrained(tmp_path)
    assert "classes: d, e, f" in (tmp_path / "README.md").read_text()


def test_from_the_hub_without_a_network(hub, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = trained()
    save_weights(model, tmp_path / "model.safetensors")

    def cached(name: str, file: str, **options: object) -> str:
        if file != "model.safetensors":
            raise hub.LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / file)

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", cached)
    assert torch.equal(hub.from_pretrained("user/model", local_files_only=True)(images), model(images))
    monkeypatch.undo()
    with pytest.raises(InputError, match="'a/b/c' is not a directory, and no repository on the hub"):
        hub.from_pretrained("a/b/c")
    with pytest.raises(InputError, match="'a/b/c' cannot be uploaded"):
        hub.push_to_hub(model, "a/b/c")


@pytest.mark.parametrize("write", ["weights", "compact", "export"])
def test_a_classifier_with_other_classes_is_described_first(write: str, images: Tensor, tmp_path: Path):
    model = trained()
    last = max(model.modules(), key=lambda each: isinstance(each, nn.Linear))
    model.classifier = nn.Linear(last.in_features, 5)

    def save() -> None:
        if write == "weights":
            save_weights(model, tmp_path / "x.safetensors")
        elif write == "compact":
            save_compact(compact(model), tmp_path / "x.safetensors")
        else:
            export(model, tmp_path / "x.safetensors", images)

    with pytest.raises(InputError, match="the model has 5 outputs, but its card 3 classes: describe it with"):
        save()
    assert not (tmp_path / "x.safetensors").exists()
    replace(model.card, classes=list("vwxyz")).describe(model)
    save()
    again = dnw_graph.load(tmp_path / "x.safetensors")
    assert again.classes == list("vwxyz")
    assert relative_error(again(images), model.eval()(images)) < 1e-5


def test_gradients_per_image_of_a_model(images: Tensor):
    model = trained()
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, weights, image.unsqueeze(0)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(weights, images)
    model.zero_grad()
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4), name


def test_a_directory_without_a_model_is_refused(hub, tmp_path: Path):
    with pytest.raises(InputError, match=r"model.safetensors' does not exist"):
        hub.from_pretrained(tmp_path)


def test_a_run_starts_from_a_file_of_weights(tmp_path: Path, images: Tensor):
    from dnw_graph.training.resuming import start_from

    model = trained()
    save_weights(model, tmp_path / "model.safetensors")
    create = MobileNetOptions(width=0.1).create
    same, other = create(3, 16), create(2, 16)
    start_from(same, create, ModelFile(tmp_path / "model.safetensors"), ["a", "b", "c"])
    assert relative_error(same.eval()(images), model(images)) < 1e-6
    start_from(other, create, ModelFile(tmp_path / "model.safetensors"), ["a", "b"])
    assert torch.equal(other.stages[0].real_index, model.stages[0].real_index)
    assert other(images).shape == (4, 2)
    save_compact(compact(model), tmp_path / "compact.safetensors")
    with pytest.raises(InputError, match="expected a checkpoint, the directory of a run, or a pretrained model"):
        start_from(same, create, ModelFile(tmp_path / "compact.safetensors"), ["a", "b", "c"])


def test_the_command_starts_from_a_pretrained_model_by_name(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("dnw_graph.training.runs.run", lambda *args: seen.append(args))
    assert main(["train", "--init-from", "mobilenet_v1_dnw.imagenette", "--width", "0.225"]) == 0
    ((_, options, _, _, _, file),) = seen
    assert file.path == FOLDER / "mobilenet_v1_dnw.imagenette.safetensors"
    assert options["model"] == "mobilenet_v1_dnw"


def test_classes_have_other_names_than_their_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = trained()
    card = replace(model.card, directories=["n1", "n2", "n3"])
    card.describe(model)
    save_weights(model, tmp_path / "model.safetensors")
    loaded = dnw_graph.load(tmp_path / "model.safetensors")
    assert (loaded.classes, loaded.card.class_directories) == (["a", "b", "c"], ["n1", "n2", "n3"])
    for number, name in enumerate(card.directories):
        (tmp_path / "val" / name).mkdir(parents=True)
        for grey in (40 * number, 80 * number + 9):
            Image.new("RGB", (16, 16), (grey,) * 3).save(tmp_path / "val" / name / f"{grey}.png")
    evaluate = ["evaluate", str(tmp_path / "model.safetensors"), "--workers", "0", "--data", str(tmp_path)]
    assert main(evaluate) == 0
    (tmp_path / "val" / "n1").rename(tmp_path / "val" / "a")
    assert main(evaluate) == 2
    assert "class directories that the training images lack, such as 'a'" in capsys.readouterr().err
    with pytest.raises(InputError, match="directories must be 3 names"):
        replace(model.card, directories=["n1"])


def test_the_model_of_imagenette_has_names_that_can_be_read():
    model = create_model("mobilenet_v1_dnw.imagenette", pretrained=True)
    assert model.classes[:3] == ["tench", "English springer", "cassette player"]
    assert model.card.class_directories[:3] == ["n01440764", "n02102040", "n02979186"]


def test_other_classes_have_directories_of_their_own():
    model = trained()
    replace(model.card, directories=["n1", "n2", "n3"]).describe(model)
    model.card.with_classes(["d", "e", "f"]).describe(model)
    assert (model.classes, model.card.class_directories) == (["d", "e", "f"], ["d", "e", "f"])


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_parts(model: nn.Module) -> nn.Module:
    model.stages[0] = compiled(model.stages[0])
    model.classifier = compiled(model.classifier)
    return model


@pytest.mark.parametrize("wrap", [compiled, compiled_parts, nn.DataParallel, AveragedModel])
@pytest.mark.parametrize("to", ["file", "hub"])
def test_a_wrapped_model_is_saved_as_the_model(wrap, to: str, images: Tensor, tmp_path: Path):
    model = trained()
    expected, card = model(images), model.card
    wrapped = wrap(model)
    card.describe(wrapped)
    if to == "file":
        save_weights(wrapped, tmp_path / "model.safetensors")
    else:
        pytest.importorskip("dnw_graph.hub").save_pretrained(wrapped, tmp_path)
        assert "3 classes: a, b, c" in (tmp_path / "README.md").read_text()
    again = dnw_graph.load(tmp_path / "model.safetensors")
    assert torch.equal(again(images), expected)
    assert again.card == card
