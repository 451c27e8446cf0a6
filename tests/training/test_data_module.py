from __future__ import annotations

from collections.abc import Callable

import pytest

from dnw_graph import InputError
from dnw_graph.training import DataModule, ImageData, RunOptions, load_images


def test_defaults_follow_the_data(small_digits: ImageData):
    data = DataModule(small_digits, RunOptions(batch_size=16))
    assert (data.image_size, data.workers, data.steps_per_epoch) == (16, 0, 4)


def test_folder_defaults(image_folder):
    data = DataModule(load_images(str(image_folder)), RunOptions(batch_size=4))
    assert data.image_size == 224
    assert data.workers >= 1


def test_batch_larger_than_the_data_is_refused(small_digits: ImageData, options: Callable[..., RunOptions]):
    assert DataModule(small_digits, options(batch_size=70)).steps_per_epoch == 1
    with pytest.raises(InputError, match="--batch-size 71 is larger than the data set: expected at most its 70"):
        DataModule(small_digits, options(batch_size=71))


def test_fewer_test_images_than_devices_are_refused(small_digits: ImageData, options: Callable[..., RunOptions]):
    with pytest.raises(InputError, match="30 test images cannot be split over 31 devices"):
        DataModule(small_digits, options(devices=31, batch_size=62))
