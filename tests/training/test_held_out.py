"""Evaluation on a part of the training images."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from dnw_graph import InputError
from dnw_graph.data.images import ArrayImages, FileImages, Images
from dnw_graph.data.sources import hold_out
from dnw_graph.training import ImageData, RunOptions, load_images, read_checkpoint, run

Create = Callable[[int, int], nn.Module]


def content(images: Images) -> list[tuple[bytes, int]]:
    """Every image with its label, in order."""
    return [(np.asarray(images.load(i)).tobytes(), int(images.labels[i])) for i in range(len(images))]


@pytest.mark.parametrize("kind", ["array", "files"])
@pytest.mark.parametrize("count", [1, 5, 11])
def test_the_parts_are_disjoint_and_complete(kind: str, count: int, image_directory: Path, small_digits: ImageData):
    images = load_images(str(image_directory)) if kind == "files" else small_digits
    assert isinstance(images.train, FileImages if kind == "files" else ArrayImages)
    whole = content(images.train)
    split = hold_out(images, count)
    assert split.held_out is split.validation
    assert split.test is images.test is images.validation
    assert len(split.held_out) == count
    assert len(split.train) == len(whole) - count
    assert Counter(content(split.train)) + Counter(content(split.held_out)) == Counter(whole)
    order = [whole.index(image) for part in (split.train, split.held_out) for image in content(part)]
    assert sorted(order[:-count]) == order[:-count]  # each part keeps the order
    assert sorted(order[-count:]) == order[-count:]
    assert (split.name, split.classes) == (images.name, images.classes)
    assert content(images.train) == whole  # the images given stay as they were


def test_files_keep_their_labels(image_directory: Path):
    images = load_images(str(image_directory))
    split = hold_out(images, 5)
    for part in (split.train, split.held_out):
        assert isinstance(part, FileImages)
        names = [Path(path).parent.name for path in part.paths]
        assert [split.classes[label] for label in part.labels] == names
        assert not any("val" in Path(path).parts for path in part.paths)


def test_the_held_out_images_are_drawn_from_everywhere():
    images = load_images("digits")
    held = hold_out(images, 400).held_out
    assert held is not None
    whole = content(images.train)
    places = np.array([whole.index(image) for image in content(held)])
    quarters = np.bincount(places * 4 // len(whole))
    # Hypergeometric: mean 100, standard deviation about 7.4.
    assert abs(quarters - 100).max() < 5 * 7.4
    assert len(np.unique(held.labels)) == 10


def test_none_held_out_changes_nothing(small_digits: ImageData):
    assert hold_out(small_digits, 0) is small_digits


def test_by_default_it_is_a_tenth_and_no_more_than_5000(small_digits: ImageData):
    assert len(hold_out(small_digits, None).held_out or ()) == 7
    many = ArrayImages(np.zeros((60_000, 1, 1, 3), np.uint8), np.zeros(60_000, np.int64))
    assert len(hold_out(replace(small_digits, train=many), None).held_out or ()) == 5000
    few = small_digits.train.part(np.arange(9))
    assert hold_out(replace(small_digits, train=few), None).held_out is None


@pytest.mark.parametrize("count", [70, 71, 1000])
def test_nothing_left_to_train_on_is_refused(count: int, small_digits: ImageData):
    with pytest.raises(InputError, match=f"--held-out is {count}: expected less than the 70 training images"):
        hold_out(small_digits, count)
    assert len(hold_out(small_digits, 69).train) == 1


def test_less_than_none_is_refused():
    with pytest.raises(InputError, match="--held-out must be 0 or more; got -1"):
        RunOptions(held_out=-1)


class Recording(nn.Module):
    """A model that keeps the mean of every image it sees, by mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 64, 10)
        self.seen: dict[bool, set[float]] = {True: set(), False: set()}

    def forward(self, x):
        self.seen[self.training] |= {round(float(value), 4) for value in x.mean((1, 2, 3))}
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_evaluates_on_the_same_ones_for_every_seed(
    seed: int, options: Callable[..., RunOptions], small_digits: ImageData, tmp_path: Path
):
    evaluated = []
    split = hold_out(small_digits, 20)
    assert split.held_out is not None
    for given, count in ((small_digits, 20), (replace(split, test=split.held_out, held_out=None), 0)):
        models: list[Recording] = []

        def create(num_classes: int, image_size: int, models: list[Recording] = models) -> nn.Module:
            models.append(Recording())
            return models[0]

        chosen = options(seed=seed, held_out=count, epochs=1, lr=0.1, output=str(tmp_path / str(count)))
        summary = run(create, {}, chosen, given)
        evaluated.append((summary.best_top1, models[0].seen[True]))
    # What the run holds out itself is what was held out before another run.
    assert evaluated[0] == evaluated[1]


@pytest.mark.slow
def test_a_resumed_run_must_hold_out_as_many(
    create: Create, options: Callable[..., RunOptions], small_digits: ImageData
):
    chosen = options(held_out=6, epochs=1)
    summary = run(create, {}, chosen, small_digits)
    last = f"{chosen.output}/last.ckpt"
    assert read_checkpoint(last)["dnw_graph"]["options"]["held_out"] == 6
    assert summary.options["held_out"] == 6
    for other in (0, 7):
        with pytest.raises(InputError, match=f"--held-out is {other}, but .* was trained with 6"):
            run(create, {}, replace(chosen, held_out=other, resume=last), small_digits)
    again = run(create, {}, replace(chosen, output=None, evaluate=last), small_digits)
    assert again.top1 == summary.best_top1  # of the only epoch


@pytest.mark.parametrize("held", [True, False])
def test_a_broken_file_is_found_wherever_it_went(
    held: bool, create: Create, options: Callable[..., RunOptions], image_directory: Path
):
    split = hold_out(load_images(str(image_directory)), 5)
    part = split.held_out if held else split.train
    assert isinstance(part, FileImages)
    broken = Path(part.paths[2])
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=f"1 of 24 image files cannot be read: {broken}"):
        run(create, {}, options(held_out=5, batch_size=4), load_images(str(image_directory)))


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_held_out_images_choose_the_checkpoint_that_is_tested(
    ema: float, create: Create, options: Callable[..., RunOptions], small_digits: ImageData
):
    chosen = options(held_out=20, epochs=3, batch_size=10, lr=0.3, ema=ema)
    backwards = replace(small_digits, test=small_digits.test.part(np.arange(7)))
    found = [
        run(create, {}, replace(chosen, output=f"{chosen.output}-{len(images.test)}"), images)
        for images in (small_digits, backwards)
    ]
    directory = Path(f"{chosen.output}-{len(small_digits.test)}")
    rows = csv.DictReader((directory / "metrics.csv").read_text().splitlines())
    held_out = [float(row["val/top1"]) for row in rows if row["val/top1"]]
    assert len(held_out) == 3
    assert found[0].best_top1 == pytest.approx(max(held_out))
    assert found[0].best_epoch == max(n for n, top1 in enumerate(held_out, 1) if top1 == max(held_out))
    # The test images decide nothing.
    assert [each.best_top1 for each in found] == [found[0].best_top1] * 2
    tested = run(create, {}, options(output=None, evaluate=str(directory / "best.ckpt")), small_digits)
    assert tested.top1 == found[0].top1
    assert f"(best.ckpt, {found[0].best_top1:.2%} of held-out images" in found[0].lines()[0]
