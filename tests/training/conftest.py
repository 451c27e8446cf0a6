from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import create_tiny, first_digits
from torch import Tensor, nn

from dnw_graph.compaction import load_compact
from dnw_graph.data.sources import ImageData, digits
from dnw_graph.recipes.options import RunOptions
from dnw_graph.training import Classifier


@pytest.fixture
def create() -> Callable[[int, int], nn.Module]:
    return create_tiny


@pytest.fixture(scope="session")
def small_digits() -> ImageData:
    return first_digits()


@pytest.fixture(scope="module")
def few_digits() -> Iterator[None]:
    """``--data digits`` is an eighth of them, so that a run is short: 180 images to train on and 45 to test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dnw_graph.data.sources.digits", partial(first_digits, 180, 45))
        yield


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., RunOptions]:
    """Options of a short run on a CPU: 4 steps per epoch of small_digits, 3 epochs."""

    def make(**changes: object) -> RunOptions:
        values = {
            "image_size": 8,
            "batch_size": 16,
            "epochs": 3,
            "lr": 1.0,
            "accelerator": "cpu",
            "workers": 0,
            "output": str(tmp_path / "run"),
        }
        return RunOptions(**{**values, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def image_directory(tmp_path: Path) -> Path:
    """The first 6 digits of classes 0 and 1 as files: train/{zero,one}/ and val/{zero,one}/."""
    root = tmp_path / "images"
    whole = digits()
    for part, images in (("train", whole.train), ("val", whole.test)):
        for label, name in enumerate(("zero", "one")):
            directory = root / part / name
            directory.mkdir(parents=True)
            for index in (images.labels == label).nonzero()[0][:6]:
                images.load(int(index)).resize((16, 16)).save(directory / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def example(request: pytest.FixtureRequest) -> ModuleType:
    """The example that a test module names in ``EXAMPLE``."""
    name = request.module.EXAMPLE
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the example in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: example.run_example(argv)


@pytest.fixture
def stopping_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """A context in which a run gets a SIGTERM within a step."""

    @contextmanager
    def stop(step: int) -> Iterator[None]:
        inner = Classifier.training_step

        def training_step(self: Classifier, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
            if self.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "training_step", training_step)
            yield

    return stop


@pytest.fixture
def scores_of_file() -> Callable[[Path, Tensor], Tensor]:
    """What an exported file makes of images."""

    def scores(path: Path, images: Tensor) -> Tensor:
        if path.suffix == ".safetensors":
            return load_compact(path)(images)
        if path.suffix == ".pt2":
            return torch.export.load(path).module()(images)
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.tensor(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])

    return scores


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
