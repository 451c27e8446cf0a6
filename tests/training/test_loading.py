"""A model from its file, and what files say about it."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from tiny import TinyModel, create_tiny, first_digits
from torch import nn

import dnw_graph
from dnw_graph import InputError, load
from dnw_graph.analysis.cost import neural_graphs
from dnw_graph.checkpoint import FORMAT, SECTION
from dnw_graph.cli import main
from dnw_graph.compaction import compact, export, save_compact
from dnw_graph.data.image_files import inspect
from dnw_graph.data.images import load_rgb
from dnw_graph.data.samples import Samples
from dnw_graph.loading import ModelFile
from dnw_graph.model_card import ModelCard, card_of
from dnw_graph.preprocessing import Preprocessing, rgb
from dnw_graph.recipes.models import FAMILIES, MobileNetOptions
from dnw_graph.training import ImageData, RunOptions, run
from dnw_graph.training.checkpoints import WholeFileIO
from dnw_graph.weights_file import save_weights

CLASSES = ["cat", "dog", "fish"]
PREPROCESS = Preprocessing(16, 20, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
OPTIONS = {"model": "mobilenet_v1_dnw", "width": 0.1, "small": False, "wiring": "random_graph", "wiring_options": {}}


def write(path: Path, model: nn.Module, lacking: tuple[str, ...] = (), **section: Any) -> Path:
    """Write a checkpoint as a run does, or as an older one did that lacked some entries of every graph."""
    state = {f"model.{name}": value for name, value in model.state_dict().items() if not name.endswith(lacking)}
    loops = {"fit_loop": {"epoch_progress": {"current": {"completed": 1}}}}
    section = {"format": FORMAT, "options": {}, **section}
    content = {SECTION: section, "global_step": 1, "loops": loops, "state_dict": state}
    WholeFileIO().save_checkpoint(content, path)
    return path


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return MobileNetOptions(width=0.1, wiring="random_graph").create(3, 16).eval()


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(PREPROCESS, CLASSES, "mobilenet", OPTIONS, {"top1": 0.75}, {"torch": "2.14"})


@pytest.fixture
def directory(tmp_path: Path, model: nn.Module, card: ModelCard) -> Path:
    """A run's directory with its best checkpoint and a compact file."""
    write(tmp_path / "best.ckpt", model, card=card.to_dict())
    save_compact(compact(load(tmp_path)), tmp_path / "small.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(tmp_path / "x.png")
    return tmp_path


PROGRAM = """
import sys
import dnw_graph
from PIL import Image
for name in ("", "/best.ckpt", "/small.safetensors"):
    model = dnw_graph.load(sys.argv[1] + name)
    assert not model.training
    scores = model(model.preprocess(Image.open(sys.argv[1] + "/x.png")).unsqueeze(0))
    print(model.classes, model.card.metrics, model.card.options["wiring"], scores.tolist())
print([name for name in ("lightning", "jsonargparse", "torchmetrics") if name in sys.modules])
"""


@pytest.mark.slow
def test_all_three_kinds_work_in_a_new_process(directory: Path, model: nn.Module):
    program = [sys.executable, "-c", PROGRAM, str(directory)]
    result = subprocess.run(
        program, capture_output=True, text=True, check=True, cwd=Path(dnw_graph.__file__).parents[1]
    )
    *said, packages = result.stdout.splitlines()
    # By hand: the shorter side to 20, the centre of 16, and the normalisation.
    pixels = np.asarray(Image.open(directory / "x.png").resize((20, 26), Image.Resampling.BILINEAR), np.float32)
    pixels = pixels[5:21, 2:18] / 255
    image = (pixels - np.array(PREPROCESS.mean, np.float32)) / np.array(PREPROCESS.std, np.float32)
    expected = model(torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0))
    start = f"{CLASSES} {{'top1': 0.75}} random_graph "
    assert len(said) == 3
    for line in said:
        assert line.startswith(start)
        torch.testing.assert_close(torch.tensor(json.loads(line.removeprefix(start))), expected, rtol=1e-3, atol=1e-4)
    assert packages == "[]"


def test_a_directory_stands_for_its_best_checkpoint_then_the_last(directory: Path, model: nn.Module, card: ModelCard):
    other = replace(card, classes=["a", "b", "c"])
    write(directory / "last.ckpt", model, card=other.to_dict())
    assert load(directory).classes == CLASSES
    (directory / "best.ckpt").unlink()
    assert load(directory).classes == ["a", "b", "c"]
    (directory / "last.ckpt").unlink()
    with pytest.raises(InputError, match=r"holds no best.ckpt and no last.ckpt"):
        load(directory)
    with pytest.raises(InputError, match="does not exist: give a run's directory"):
        load(directory / "nothing")


def test_loading_draws_no_random_numbers(directory: Path):
    before = torch.get_rng_state()
    load(directory)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_run_writes_is_loaded(
    small_digits: ImageData, options: Callable[..., RunOptions], capsys: pytest.CaptureFixture[str]
):
    chosen = options(epochs=1)
    summary = run(create_tiny, {"size": 2}, chosen, small_digits)
    with pytest.raises(InputError, match=r"trained with a program of its own: register them with .*register_models"):
        load(str(chosen.output))
    model = load(str(chosen.output), create=create_tiny)
    samples = Samples(small_digits.test, model.preprocess)
    scores = model(torch.stack([samples[index][0] for index in range(30)]))
    top1 = (scores.argmax(1) == torch.from_numpy(small_digits.test.labels)).float().mean().item()
    assert top1 == pytest.approx(summary.top1)
    assert model.card.metrics == pytest.approx({"top1": summary.top1, "top5": summary.top5, "step": 4, "epoch": 1})
    assert model.card.options["size"] == 2
    assert model.card.options["lr"] == 1.0
    assert not {"output", "workers", "data"} & set(model.card.options)  # nothing of the machine
    assert model.card.versions["torch"] == torch.__version__.partition("+")[0]


def test_checkpoints_without_a_card_tell_what_their_options_do(tmp_path: Path, model: nn.Module):
    options = {**OPTIONS, "image_size": 16, "classes": CLASSES, "train_images": 100}
    found = load(write(tmp_path / "old.ckpt", model, options=options))
    assert found.classes == CLASSES
    assert (found.preprocess.resize, found.preprocess.mean) == (16, (0.491, 0.482, 0.447))
    digits = MobileNetOptions(width=0.1, wiring="random_graph").create(10, 16)
    options |= {"classes": list("0123456789"), "train_images": 1437}
    assert load(write(tmp_path / "old.ckpt", digits, options=options)).preprocess.mean == (0.305,) * 3
    found = load(
        write(
            tmp_path / "old.ckpt",
            model,
            ("rule", "num_edges", "wiring.checksum"),
            options=options | {"classes": CLASSES},
        )
    )
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(InputError, match="lacks its classes and image size"):
        load(write(tmp_path / "old.ckpt", model, options=OPTIONS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": "mine"}, r"models 'mine', which are not registered here"),
        ({"options": {**OPTIONS, "wiring": "os.path.Evil"}}, r"the rule 'os.path.Evil', which is not registered here"),
        ({"options": {**OPTIONS, "width": "0.1"}}, r"--width must be a finite number"),
        ({"options": {**OPTIONS, "width": 0.2}}, r"do not fit the model"),
        ({"classes": []}, r"classes must be at least one name"),
        ({"preprocess": {"image_size": 16}}, r"card cannot be read"),
        ({"preprocess": {**PREPROCESS.__dict__, "std": [0.0, 1.0, 1.0]}}, r"std must be three numbers above 0"),
    ],
)
def test_cards_that_cannot_be_used_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, model: nn.Module, card: ModelCard, unchecked: None
):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "x.ckpt", model, card={**card.to_dict(), **change}))


def test_models_of_ones_own_are_loaded_by_their_name(tmp_path: Path, card: ModelCard, monkeypatch: pytest.MonkeyPatch):
    from test_command_line import TinyOptions

    from dnw_graph.training import register_models

    monkeypatch.setattr("dnw_graph.recipes.models.FAMILIES", dict(FAMILIES))
    register_models("mine", TinyOptions)
    with pytest.raises(InputError, match="'mine' are made by TinyOptions already"):
        register_models("mine", MobileNetOptions)
    card = replace(card, models="mine", options={"size": 2.0})
    assert isinstance(load(write(tmp_path / "x.ckpt", TinyModel(3), card=card.to_dict())), TinyModel)


# Images.


def test_unreadable_exif_says_nothing(tmp_path: Path):
    whole = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    for exif in (b"no tiff header", b"x"):
        whole.save(tmp_path / "x.png", exif=exif)
        assert inspect(str(tmp_path / "x.png")) == ("PNG RGB", None)
        assert np.array_equal(np.asarray(load_rgb(str(tmp_path / "x.png"))), np.asarray(whole))


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_pixels_without_a_known_range_are_refused(mode: str, tmp_path: Path):
    Image.new(mode, (8, 8)).save(tmp_path / "x.tiff")
    assert inspect(str(tmp_path / "x.tiff"))[1] == "pixels without a known range"
    with pytest.raises(InputError, match=f"of mode {mode} has no known range"):
        load_rgb(str(tmp_path / "x.tiff"))


def test_grey_images_of_16_bits_are_scaled(tmp_path: Path):
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    for ending in ("png", "tif"):
        Image.fromarray(grey).save(tmp_path / f"x.{ending}")
        found = np.asarray(rgb(Image.open(tmp_path / f"x.{ending}")))
        assert np.array_equal(found, np.repeat(np.round(grey / 257).astype(np.uint8)[..., None], 3, axis=-1))


def test_images_are_turned_as_exif_says(tmp_path: Path):
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: its left is the top
    Image.fromarray(np.rot90(upright)).save(tmp_path / "x.jpg", exif=exif, quality=100)
    image = Image.open(tmp_path / "x.jpg")
    found = rgb(image)
    assert found.size == (8, 16)
    assert np.abs(np.asarray(found).astype(int) - upright).max() < 30
    assert image.size == (16, 8)  # it stays as it was


def with_wrong_tag(tag: int, kind: int, count: int, value: bytes, ending: str = "JPEG") -> Image.Image:
    """An image that was turned, with another EXIF tag that Pillow cannot write again."""
    entries = sorted(struct.pack("<HHI4s", *each) for each in ((0x112, 3, 1, b"\6\0\0\0"), (tag, kind, count, value)))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, ending, exif=exif)
    return Image.open(file)


def test_images_are_turned_whatever_else_is_in_exif():
    assert rgb(with_wrong_tag(0x102, 4, 1, struct.pack("<I", 70000))).size == (20, 40)
    assert rgb(with_wrong_tag(0x11B, 2, 4, b"abc\0")).size == (20, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_every_orientation_is_that_of_pillow(orientation: int, ending: str, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"x.{ending}", exif=exif)
    with Image.open(tmp_path / f"x.{ending}") as image:
        expected = ImageOps.exif_transpose(image)
    assert np.array_equal(np.asarray(rgb(Image.open(tmp_path / f"x.{ending}"))), np.asarray(expected))


def test_tensors_are_prepared_like_images():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    preprocess = Preprocessing(16, 20, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    for tensor in (pixels, pixels / 255):
        torch.testing.assert_close(preprocess(tensor), preprocess(image))
    assert preprocess(torch.stack([pixels] * 2)).shape == (2, 3, 16, 16)
    for wrong in (pixels[:2], pixels.long(), np.asarray(image)):
        with pytest.raises(InputError, match="an image must be a PIL image, or a tensor"):
            preprocess(wrong)  # type: ignore[arg-type]


# Exports.


def test_a_compact_file_carries_the_card_and_nothing_else_changes(directory: Path, card: ModelCard):
    small = load(directory / "small.safetensors")
    assert card_of(small) == card
    with safe_open(directory / "small.safetensors", "pt") as file:
        assert json.loads(file.metadata()["card"]) == card.to_dict()


@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_a_program_carries_the_card(with_preprocessing: bool, directory: Path, card: ModelCard, unchecked: None):
    model = load(directory)
    path = directory / "x.pt2"
    said = export(model, path, torch.zeros(2, 3, 16, 16), with_preprocessing)
    assert said.startswith(f"written to {path}: ")
    assert " ms for one image (median of 15" in said
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("card.json"))
        assert json.loads(archive.read(name)) == card.to_dict()
    extra = {"card.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert program.graph_signature.user_inputs == ("image",)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor(PREPROCESS.mean).view(3, 1, 1)) / torch.tensor(PREPROCESS.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(
        program.module()(pixels if with_preprocessing else normalised), model(normalised), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("with_preprocessing", [False, True])
def test_onnx_carries_the_card(with_preprocessing: bool, directory: Path, card: ModelCard, unchecked: None):
    import onnxruntime

    model = load(directory)
    export(model, directory / "x.onnx", torch.zeros(2, 3, 16, 16), with_preprocessing)
    (entry,) = (each for each in onnx.load(directory / "x.onnx").metadata_props if each.key == "dnw_graph.card")
    assert json.loads(entry.value) == card.to_dict()
    session = onnxruntime.InferenceSession(directory / "x.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in (*session.get_inputs(), *session.get_outputs())] == ["image", "logits"]
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    normalised = (pixels / 255 - torch.tensor(PREPROCESS.mean).view(3, 1, 1)) / torch.tensor(PREPROCESS.std).view(
        3, 1, 1
    )
    image = (pixels if with_preprocessing else normalised).numpy()
    (logits,) = session.run(["logits"], {"image": image})
    torch.testing.assert_close(torch.from_numpy(logits), model(normalised), rtol=1e-3, atol=1e-4)


def eps_of(model: nn.Module) -> set[float]:
    graphs = neural_graphs(model).values()
    return {each.eps for graph in graphs for each in graph.modules() if isinstance(each, nn.BatchNorm2d)}


@pytest.mark.parametrize("name", ["best.ckpt", "weights.safetensors", "compact.safetensors", "x.pt2", "x.onnx"])
def test_every_file_says_which_eps_the_norms_of_nodes_have(name: str, tmp_path: Path, card: ModelCard):
    options, path = MobileNetOptions(width=0.1, wiring="random_graph", node_norm_eps=0.02), tmp_path / name
    write(tmp_path / "best.ckpt", options.create(3, 16), card=replace(card, options=options.identity()).to_dict())
    model = load(tmp_path)
    if name.startswith("weights"):
        save_weights(model, path)
    elif not name.endswith(".ckpt"):
        export(model, path, torch.zeros(2, 3, 16, 16))
    found = ModelFile(path).card.options
    assert found["node_norm_eps"] == 0.02
    assert eps_of(MobileNetOptions(**found).create(3, 16)) == {0.02}
    if name in ("best.ckpt", "weights.safetensors"):  # in the others norms are folded into products
        assert eps_of(load(path)) == {0.02}


def test_preprocessing_that_is_not_known_is_not_baked_in(directory: Path, model: nn.Module):
    for source, name in ((model, "x.pt2"), (load(directory), "x.safetensors")):
        with pytest.raises(InputError, match=r"preprocessing can be part of .pt2 and .onnx files of models"):
            export(source, directory / name, torch.zeros(2, 3, 16, 16), with_preprocessing=True)


def test_a_card_larger_than_its_file_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/card.json", b" " * 2**20)
    with pytest.raises(InputError, match="has no card that can be read"):
        _ = ModelFile(tmp_path / "x.pt2").card


@pytest.mark.usefixtures("few_digits")
def test_a_compact_file_is_evaluated_and_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    options = MobileNetOptions(width=0.1, wiring="random_graph")
    model = options.create(10, 8).eval()
    classes = list("0123456789")
    ModelCard(Preprocessing(8, 8, (0.5,) * 3, (0.25,) * 3), classes, "mobilenet", options.identity()).describe(model)
    save_compact(compact(model), "x.safetensors")
    test = first_digits(180, 45).test
    samples = Samples(test, model.preprocess)
    with torch.no_grad():
        right = model(torch.stack([samples[index][0] for index in range(45)])).argmax(1)
    top1 = (right == torch.from_numpy(test.labels)).float().mean().item()
    evaluate = ["evaluate", "x.safetensors", "--data", "digits", "--workers", "0", "--accelerator", "cpu"]
    assert main([*evaluate, "--compact", "--export", "y.safetensors", "--output", "run"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["top1"] == pytest.approx(top1)
    assert main(["evaluate", "y.safetensors", *evaluate[2:]]) == 0
    assert main(["export", "x.safetensors", "y.pt2"]) == 0


def test_a_compact_file_is_not_exported_to_onnx(directory: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(directory / "small.safetensors"), str(directory / "x.onnx")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "compact already, with sparse products" in line
