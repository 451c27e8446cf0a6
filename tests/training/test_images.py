from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from dnw_graph import InputError
from dnw_graph.data.image_files import check_files, class_lines
from dnw_graph.data.images import ArrayImages, FileImages
from dnw_graph.data.samples import Samples
from dnw_graph.data.transforms import transforms
from dnw_graph.training import load_images


def test_digits_are_split_at_the_last_360_and_keep_their_values():
    data = load_images("digits")
    pixels, labels = load_digits(return_X_y=True)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert np.concatenate([data.train.labels, data.test.labels]).tolist() == labels.tolist()
    assert min(Counter(data.test.labels.tolist()).values()) >= 30
    image = np.asarray(data.test.load(7))
    assert image.shape == (8, 8, 3)
    assert (image == image[..., :1]).all()
    np.testing.assert_allclose(image[..., 0].ravel() * (16 / 255), pixels[1437 + 7], atol=0.04)


def test_directory_gives_each_image_the_label_of_its_directory(image_directory: Path):
    data = load_images(str(image_directory))
    assert data.classes == ["one", "zero"]
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    assert data.test.labels.tolist() == [0] * 6 + [1] * 6
    assert data.train.load(0).mode == "RGB"
    first = min((image_directory / "train" / "one").iterdir())
    assert np.array_equal(np.asarray(data.train.load(0)), np.asarray(Image.open(first)))


def test_test_directory_may_be_called_test(image_directory: Path):
    (image_directory / "val").rename(image_directory / "test")
    assert len(load_images(str(image_directory)).test) == 12


def test_a_class_may_be_absent_from_the_test_images(image_directory: Path):
    for file in (image_directory / "val" / "one").iterdir():
        file.unlink()
    (image_directory / "val" / "one").rmdir()
    assert load_images(str(image_directory)).test.labels.tolist() == [1] * 6


def test_other_modes_become_rgb(image_directory: Path):
    for index, mode in enumerate(("L", "RGBA", "P", "CMYK", "1")):
        Image.new(mode, (9, 9)).save(
            image_directory / "train" / "one" / f"aa{index}.{'jpg' if mode == 'CMYK' else 'png'}"
        )
    data = load_images(str(image_directory))
    assert {data.train.load(index).mode for index in range(5)} == {"RGB"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root.rename(root.with_name("gone")), "does not exist: give 'digits'"),
        (lambda root: (root / "train").rename(root / "training"), "has no train/: expected"),
        (lambda root: (root / "val").rename(root / "validation"), r"has no val/ \(or test/\)"),
        (
            lambda root: (root / "val" / "one").rename(root / "val" / "won"),
            "that the training images lack, such as 'won'",
        ),
        (lambda root: (root / "train" / "two").mkdir(), "two contains no images"),
        (lambda root: [f.unlink() for f in (root / "val" / "zero").iterdir()], "zero contains no images"),
        (lambda root: (root / "train").rename(root / "val" / "x") and (root / "train").mkdir(), "no class directories"),
    ],
)
def test_unusable_directories_are_refused(image_directory: Path, change, message: str):
    change(image_directory)
    with pytest.raises(InputError, match=message) as error:
        load_images(str(image_directory))
    assert "\n" not in str(error.value)


def test_cifar10_that_cannot_be_downloaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(InputError, match=r"could not be downloaded \(no network\)"):
        load_images("cifar10")


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    data = load_images("digits")
    train, _ = transforms("digits", 16)
    samples = Samples(data.train, train, seed=3)
    before = torch.get_rng_state()
    first = samples[0, 5][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    _ = samples[0, 6]
    assert torch.equal(samples[0, 5][0], first)
    assert any(not torch.equal(samples[epoch, 5][0], first) for epoch in range(1, 5))
    other = Samples(data.train, train, seed=4)
    assert any(not torch.equal(other[e, 5][0], samples[e, 5][0]) for e in range(5))


def test_equal_images_are_augmented_differently():
    one = load_images("digits").train.load(0)
    images = ArrayImages(np.stack([np.asarray(one)] * 8), [0] * 8)
    samples = Samples(images, transforms("digits", 16)[0], seed=0)
    assert len({samples[0, index][0].sum().item() for index in range(8)}) > 1


def test_a_link_back_ends_and_no_image_comes_twice(image_directory: Path):
    zero = image_directory / "train" / "zero"
    paths = load_images(str(image_directory)).train.paths
    (zero / "again").symlink_to(zero)
    assert load_images(str(image_directory)).train.paths == paths


def test_images_come_in_the_order_of_torchvision(image_directory: Path):
    for name in ("b", "a-b", "a", "a/b"):
        directory = image_directory / "train" / "zero" / name
        directory.mkdir(parents=True, exist_ok=True)
        for file in ("2.png", "1.JPG", "note.txt"):
            (directory / file).touch()
    expected = [path for path, _ in ImageFolder(image_directory / "train").samples]
    assert load_images(str(image_directory)).train.paths == expected


def test_names_with_odd_bytes_are_escaped(image_directory: Path):
    for name in (b"x\ny.png", b"\xff.png"):
        (image_directory / "train" / "zero" / os.fsdecode(name)).write_bytes(b"no image")
    data = load_images(str(image_directory))
    for index, path in enumerate(data.train.paths):
        if Path(path).read_bytes() == b"no image":
            with pytest.raises(InputError, match=r"zero/(x\\ny|\\udcff)\.png .* replace or remove it$") as error:
                data.train.load(index)
            str(error.value).encode()


def test_a_pipe_is_not_waited_for(image_directory: Path):
    os.mkfifo(image_directory / "train" / "one" / "0.png")
    with pytest.raises(InputError, match="not a regular file"):
        load_images(str(image_directory)).train.load(0)


def test_directories_of_systems_and_links_back_are_no_classes(image_directory: Path):
    train = image_directory / "train"
    for name in (".cache", "__MACOSX", "@eaDir"):
        (train / name).mkdir()
        (train / "one" / name).mkdir()
        (train / "one" / name / "x.png").touch()
    (train / "loop").symlink_to(train)
    (train / "up").symlink_to(image_directory)
    data = load_images(str(image_directory))
    assert data.classes == ["one", "zero"]
    assert len(data.train) == 12


def test_images_without_an_ending_are_known_by_what_they_hold(image_directory: Path):
    one = image_directory / "train" / "one"
    image = Image.new("RGB", (9, 9))
    image.save(one / "a.jfif", "JPEG")
    image.save(one / "b", "PNG")
    (one / "README").write_text("no image")
    (one / "note.txt").touch()
    (one / ".hidden.png").touch()
    train = load_images(str(image_directory)).train
    assert isinstance(train, FileImages)
    assert {Path(path).name for path in train.paths} >= {"a.jfif", "b"}
    assert len(train) == 14
    assert train.ignored == {("one", "no suffix"): 1, ("one", ".txt"): 1, ("one", ".png"): 1}


def test_there_is_a_line_per_class(image_directory: Path, capsys: pytest.CaptureFixture[str]):
    one = image_directory / "train" / "one"
    Image.new("L", (9, 9)).save(one / "grey.jpg")
    (one / "note.txt").touch()
    data = load_images(str(image_directory))
    learned, held_out = (data.train.part(np.array(index)) for index in ([0, 1, 3, 4, 5, 6, *range(7, 13)], [2]))
    check_files(data.classes, train=learned, held_out=held_out, test=data.test)
    assert capsys.readouterr().out.splitlines() == [
        "class 0 'one': 6 train + 1 held out + 6 test: 12 PNG RGB, 1 JPEG L; ignored: 1 .txt",
        "class 1 'zero': 6 train + 0 held out + 6 test: 12 PNG RGB",
    ]


def test_of_many_classes_the_first_are_listed():
    labels = {"train": range(60), "held out": [0]}
    lines = class_lines([f"c{n}" for n in range(60)], labels, ["PNG RGB"] * 61, Counter())
    assert len(lines) == 51
    assert lines[0] == "class 0 'c0': 1 train + 1 held out: 2 PNG RGB"
    assert lines[-1] == "… and 10 more classes; 1 to 2 images in each"
