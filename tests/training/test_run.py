"""What is refused before training, and runs on several processes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import rest_is_slow
from torch import nn

from dnw_graph import InputError
from dnw_graph.data.images import ArrayImages
from dnw_graph.training import Classifier, ImageData, RunOptions, load_images, run

Create = Callable[[int, int], nn.Module]
MODEL = {"model": "tiny", "width": 1.0}


@pytest.fixture
def trained(create: Create, small_digits: ImageData, options: Callable[..., RunOptions]) -> RunOptions:
    """Options that resume a finished run of one epoch."""
    chosen = options(epochs=1)
    run(create, MODEL, chosen, small_digits)
    return replace(chosen, resume=f"{chosen.output}/last.ckpt")


@pytest.mark.parametrize(
    ("name", "value"),
    rest_is_slow(
        [
            ("epochs", 2),
            ("batch_size", 8),
            ("lr", 0.5),
            ("momentum", 0.5),
            ("weight_decay", 0.0),
            ("seed", 1),
            ("image_size", 16),
            ("precision", "bf16-mixed"),
        ]
    ),
)
def test_resume_with_another_option_is_refused(
    name: str, value: float, trained: RunOptions, create: Create, small_digits: ImageData
):
    then = getattr(trained, name)
    with pytest.raises(InputError) as error:
        run(create, MODEL, replace(trained, **{name: value}), small_digits)
    flag = "--" + name.replace("_", "-")
    assert str(error.value).startswith(f"{flag} is {value!r}, but {trained.resume} was trained with {then!r}")


@pytest.mark.parametrize("evaluate", [False, True])
def test_another_model_or_data_is_refused(
    evaluate: bool, trained: RunOptions, create: Create, small_digits: ImageData, image_directory: Path
):
    if evaluate:
        trained = replace(trained, resume=None, evaluate=trained.resume, output=None)
    with pytest.raises(InputError, match=r"--width is 2.0, but .*last.ckpt was trained with 1.0"):
        run(create, {**MODEL, "width": 2.0}, trained, small_digits)
    with pytest.raises(InputError, match="is a checkpoint of another program: it lacks --wiring"):
        run(create, {**MODEL, "wiring": "dnw"}, trained, small_digits)
    with pytest.raises(InputError, match=r"--data is 2 classes, 'one' ... 'zero', but .* 10 classes, '0' ... '9'"):
        run(create, MODEL, replace(trained, batch_size=4), load_images(str(image_directory))) if evaluate else run(
            create, MODEL, trained, replace(load_images(str(image_directory)), train=small_digits.train, name="digits")
        )


def test_resume_with_other_training_images_is_refused(trained: RunOptions, create: Create, small_digits: ImageData):
    train = small_digits.train
    assert isinstance(train, ArrayImages)
    fewer = replace(small_digits, train=ArrayImages(train.pixels[:69], train.labels[:69]))
    with pytest.raises(InputError, match=r"--data is 69 training images, but .* was trained with 70 training images"):
        run(create, MODEL, trained, fewer)


def test_weights_of_another_model_are_refused(trained: RunOptions, small_digits: ImageData):
    def other(num_classes: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    with pytest.raises(InputError, match="do not fit the model"):
        run(other, MODEL, replace(trained, resume=None, evaluate=trained.resume), small_digits)


def test_evaluation_needs_no_training_options(trained: RunOptions, create: Create, small_digits: ImageData, capsys):
    summary = run(create, MODEL, trained, small_digits)
    before = sorted(Path(trained.output or "").iterdir())
    chosen = RunOptions(image_size=8, accelerator="cpu", batch_size=5, evaluate=trained.resume)
    evaluated = run(create, MODEL, chosen, small_digits)
    assert (evaluated.top1, evaluated.top5) == (summary.top1, summary.top5)
    assert evaluated.parameters == summary.parameters
    assert sorted(Path(trained.output or "").iterdir()) == before
    assert "swapped" not in capsys.readouterr().out.split("top-1")[-1]


def test_a_run_is_not_overwritten(trained: RunOptions, create: Create, small_digits: ImageData):
    with pytest.raises(InputError, match="already holds a run: continue it with --resume"):
        run(create, MODEL, replace(trained, resume=None), small_digits)


def test_output_that_cannot_be_a_directory_is_refused(
    tmp_path: Path, create: Create, small_digits: ImageData, options: Callable[..., RunOptions]
):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to directory .*give another one with --output"):
        run(create, MODEL, options(output=str(tmp_path / "file" / "run")), small_digits)


@pytest.mark.slow
def test_runs_are_numbered(
    tmp_path: Path,
    create: Create,
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(create, MODEL, options(epochs=1, output=None), small_digits)
    assert sorted(p.parent.as_posix() for p in Path("runs").glob("*/last.ckpt")) == ["runs/1", "runs/2"]


def test_resume_may_go_to_another_directory(
    trained: RunOptions, create: Create, small_digits: ImageData, tmp_path: Path
):
    run(create, MODEL, replace(trained, output=str(tmp_path / "other")), small_digits)
    assert (tmp_path / "other" / "summary.json").exists()


def test_a_gpu_that_is_not_there_is_refused(
    create: Create, small_digits: ImageData, options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match="no GPU is available"):
        run(create, MODEL, options(accelerator="gpu"), small_digits)
    with pytest.raises(InputError, match="16-mixed needs a GPU"):
        run(create, MODEL, options(precision="16-mixed"), small_digits)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match="--devices is 4, but there are 2 GPUs"):
        run(create, MODEL, options(accelerator="gpu", devices=4), small_digits)


def test_a_broken_image_is_found_before_training(
    create: Create, options: Callable[..., RunOptions], image_directory: Path
):
    broken = sorted((image_directory / "val" / "one").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=f"1 of 24 image files cannot be read: {broken}"):
        run(create, MODEL, options(batch_size=4), load_images(str(image_directory)))
    assert not list(image_directory.parent.glob("run/*.ckpt"))


@pytest.mark.parametrize("workers", rest_is_slow([0, 1]))
def test_an_image_that_breaks_later_stops_the_run_with_its_steps_saved(
    workers: int,
    create: Create,
    options: Callable[..., RunOptions],
    image_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("dnw_graph.data.samples.KEPT_BYTES", 0)  # read in every epoch, as large images are
    whole = sorted((image_directory / "val" / "one").iterdir())[2]
    content = whole.read_bytes()
    whole.write_bytes(content[:60])
    chosen = options(batch_size=4, workers=workers, check_images=False)
    with pytest.raises(InputError, match=f"cannot read image {whole}"):
        run(create, MODEL, chosen, load_images(str(image_directory)))
    whole.write_bytes(content)
    resumed = run(
        create, MODEL, replace(chosen, resume=f"{chosen.output}/last.ckpt"), load_images(str(image_directory))
    )
    shutil.rmtree(chosen.output or "")
    assert replace(run(create, MODEL, chosen, load_images(str(image_directory))), seconds=None) == replace(
        resumed, seconds=None
    )


def test_mixed_precision_runs(create: Create, small_digits: ImageData, options: Callable[..., RunOptions]):
    assert np.isfinite(run(create, MODEL, options(precision="bf16-mixed", epochs=1), small_digits).top1)


@pytest.mark.slow
def test_cudnn_is_deterministic_while_training_and_as_it_was_afterwards(
    create: Create, small_digits: ImageData, options: Callable[..., RunOptions], monkeypatch: pytest.MonkeyPatch
):
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    before = cudnn.deterministic, cudnn.allow_tf32

    def step(self: Classifier, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        seen.append((cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
        return training_step(self, batch, batch_idx)

    training_step = Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", step)
    run(create, MODEL, options(epochs=1), small_digits)
    assert set(seen) == {(True, False, before[1])}
    assert (cudnn.deterministic, cudnn.allow_tf32) == before
    assert cudnn.benchmark


def test_a_checkpoint_is_read_once_whatever_its_ending(
    trained: RunOptions, create: Create, small_digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert trained.resume is not None
    copy, read, module = tmp_path / "copy.pt", [], sys.modules["dnw_graph.training.runs"]
    copy.write_bytes(Path(trained.resume).read_bytes())
    reader = module.read_checkpoint
    for name in ("dnw_graph.training.runs", "dnw_graph.training.checkpoints", "dnw_graph.loading"):
        monkeypatch.setattr(sys.modules[name], "read_checkpoint", lambda path: read.append(path) or reader(path))
    run(create, MODEL, replace(trained, resume=None, evaluate=str(copy), output=None), small_digits)
    assert read == [copy]


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "products", "steps"), [(False, "sparse", 1), (True, "dense", 20)])
def test_what_differs_on_a_gpu(
    gpu: bool,
    products: str,
    steps: int,
    trained: RunOptions,
    create: Create,
    small_digits: ImageData,
    monkeypatch: pytest.MonkeyPatch,
):
    module = sys.modules["dnw_graph.training.runs"]  # the package gives its name to the function
    seen = []
    training = sys.modules["dnw_graph.training.trainer"]
    compact, trainer = module.compact, training.Trainer
    for each in (module, training):
        monkeypatch.setattr(each, "on_gpu", lambda options: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(
        module, "compact", lambda *args, **given: seen.append(given["products"]) or compact(*args, **given)
    )
    monkeypatch.setattr(
        training,
        "Trainer",
        lambda **given: seen.append(given["callbacks"][0]) or trainer(**{**given, "accelerator": "cpu"}),
    )
    run(create, MODEL, replace(trained, resume=None, evaluate=trained.resume, compact=True, output=None), small_digits)
    assert seen[0] == products
    assert seen[1].refresh_rate == steps
