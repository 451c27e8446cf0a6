"""The callback records every epoch, and a resumed run records what an unbroken one does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dnw_graph import InputError, NeuralGraph, sparsify
from dnw_graph.training import SCHEDULES, ImageData, RunOptions, WiringRecorder, run
from dnw_graph.visualize import Recording
from dnw_graph.visualize.pictures import draw_pictures, log_pictures, write_pictures


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        sparsify(self.net, 0.3)
        self.seen: list[list[int]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1.0, momentum=0.9)


class Unsized(IterableDataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[object]:
        return (self.data[number] for number in range(len(self.data)))


def fit(
    recorder: WiringRecorder,
    epochs: int | None = None,
    accumulate: int = 1,
    steps: int = -1,
    sized: bool = True,
    beside: Callback | None = None,
    **options: object,
) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 6, generator=generator), torch.arange(24) % 3)
    trainer = Trainer(
        max_epochs=epochs,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[recorder, beside] if beside else [recorder],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(data if sized else Unsized(data), batch_size=4), **options)
    return trainer


@pytest.mark.parametrize(
    ("every", "accumulate", "expected"),
    [
        (0, 1, [(0, 0), (6, 1), (12, 2)]),
        (4, 1, [(0, 0), (4, 4 / 6), (6, 1), (8, 8 / 6), (12, 2)]),
        (2, 2, [(0, 0), (2, 4 / 6), (3, 1), (4, 8 / 6), (6, 2)]),
    ],
)
def test_moments_are_steps_of_the_optimiser(every: int, accumulate: int, expected: list[tuple[int, float]]):
    recorder = WiringRecorder(every_n_steps=every)
    fit(recorder, 2, accumulate)
    assert recorder.recording is not None
    assert [(m.step, pytest.approx(m.epoch)) for m in recorder.recording.moments] == expected
    assert list(recorder.recording.graphs) == ["net.0.weight", "net.2.weight"]
    assert sum(graph.swaps().sum() for graph in recorder.recording.graphs.values()) > 0


def moments(recorder: WiringRecorder) -> list[tuple[int, float | None]]:
    assert recorder.recording is not None
    return [(moment.step, moment.epoch and round(moment.epoch, 6)) for moment in recorder.recording.moments]


def test_a_run_that_ends_within_an_epoch_has_a_part_of_it(tmp_path: Path):
    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    recorder, again, accumulated = WiringRecorder(), WiringRecorder(), WiringRecorder()
    fit(recorder, steps=3, beside=Keep())
    assert moments(recorder) == [(0, 0), (3, 0.5)]
    fit(again, steps=9, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert moments(again) == [(0, 0), (3, 0.5), (6, 1), (9, 1.5)]
    fit(accumulated, steps=1, accumulate=3)
    assert moments(accumulated) == [(0, 0), (1, 0.5)]


def test_within_an_epoch_of_unknown_length_its_number_is_unknown():
    recorder = WiringRecorder(every_n_steps=4)
    fit(recorder, steps=10, sized=False)
    assert moments(recorder) == [(0, 0), (4, None), (6, 1), (8, None), (10, None)]


def test_a_checkpoint_carries_the_recording(tmp_path: Path):
    whole, first = WiringRecorder(tmp_path / "whole"), WiringRecorder()
    fit(whole, 3)
    trainer = fit(first, 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = WiringRecorder(tmp_path / "resumed")
    fit(resumed, 3, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_model_without_graphs_is_not_recorded(small_digits: ImageData, options: Callable[..., RunOptions]):
    def plain(num_classes: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))

    chosen = options(epochs=1)
    run(plain, {}, chosen, small_digits)
    assert not (Path(chosen.output or "") / "wiring.recording").exists()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_stopped_within_an_epoch_records_the_same(
    create: Callable[[int, int], nn.Module],
    small_digits: ImageData,
    options: Callable[..., RunOptions],
    tmp_path: Path,
    schedule: str,
):
    options = partial(options, record_every=2, epochs=2, schedule=schedule)

    def stopping(classes: int, image_size: int) -> nn.Module:
        model, calls = create(classes, image_size), iter(range(99))

        def stop(*_: object) -> None:
            if model.training and next(calls) == 6:
                raise RuntimeError("stop")

        model.register_forward_pre_hook(stop)
        return model

    whole, broken = (options(output=str(tmp_path / name)) for name in ("whole", "broken"))
    run(create, {}, whole, small_digits)
    with pytest.raises(RuntimeError):
        run(stopping, {}, broken, small_digits)
    resume = options(output=broken.output, resume=str(tmp_path / "broken" / "last.ckpt"))
    run(create, {}, resume, small_digits)
    paths = [tmp_path / name / "wiring.recording" for name in ("whole", "broken")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    recording = Recording.load(paths[0])
    assert [moment.step for moment in recording.moments] == [0, 2, 4, 6, 8]
    with pytest.raises(InputError, match="another model"):
        Recording.load(paths[0], Module())


class Board(WandbLogger):
    """Takes what W&B would get, without the package."""

    def __init__(self) -> None:
        self.taken: dict[str, object] = {}

    @property
    def experiment(self) -> object:
        return self

    def log_image(self, key: str, images: list[object], step: int | None = None, **_: object) -> None:
        self.taken[key] = images[0]

    def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        self.taken |= metrics

    def save(self) -> None:
        pass


def test_pictures_go_into_tensorboard_and_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in = SimpleNamespace(Html=str, Video=lambda content, **options: (content.read(), options))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    model = NeuralGraph((3, 4, 2), 9, name="a/b")
    recording = Recording(model)
    model.reset_parameters()
    recording.add(5, 1.0)
    (tmp_path / "metrics.csv").write_text("step,val/top1\n5,0.5\n")
    pictures = draw_pictures(recording, tmp_path / "metrics.csv")
    names = ["page.html", "training.png", "a_b-wiring.png", "a_b-evolution.png", "a_b.gif"]
    assert list(pictures) == names
    write_pictures(pictures, tmp_path / "pictures")
    assert {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == pictures
    board, tensorboard = Board(), TensorBoardLogger(tmp_path, name="", version="")
    log_pictures(pictures, [board, tensorboard], 5)
    assert set(board.taken) == {f"wiring/{name.rpartition('.')[0]}" for name in names}
    assert board.taken["wiring/a_b"] == (pictures["a_b.gif"], {"format": "gif"})
    assert board.taken["wiring/page"] == pictures["page.html"].decode()
    events = EventAccumulator(tensorboard.log_dir).Reload()
    shown = {tag: events.Images(tag)[0] for tag in events.Tags()["images"]}
    assert set(shown) == {f"wiring/{name.rpartition('.')[0]}" for name in names[1:]}
    assert shown["wiring/a_b"].encoded_image_string == pictures["a_b.gif"]
    assert {event.step for event in shown.values()} == {5}


def test_a_run_writes_pictures_when_asked(
    create: Callable[[int, int], nn.Module], small_digits: ImageData, options: Callable[..., RunOptions]
):
    chosen = options(epochs=1, pictures=True)
    run(create, {}, chosen, small_digits)
    directory = Path(chosen.output or "")
    expected = {"page.html", "training.png", "tiny-wiring.png", "tiny-evolution.png", "tiny.gif"}
    assert {path.name for path in (directory / "pictures").iterdir()} == expected
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert "wiring/tiny" in events.Tags()["images"]


def test_a_second_fit_has_a_recording_of_its_own():
    recorder = WiringRecorder()
    fit(recorder, 2)
    first = recorder.recording
    fit(recorder, 3)
    assert recorder.recording is not first
    assert [moment.step for moment in recorder.recording.moments] == [0, 6, 12, 18]
