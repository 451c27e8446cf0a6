from __future__ import annotations

import pytest

from dnw_graph import InputError
from dnw_graph.training import RunOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("devices", 0),
        ("num_nodes", 0),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("image_size", 7),
        ("workers", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("save_every", -1),
        ("warmup_epochs", -1),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.0),
        ("data", ""),
        ("output", ""),
        ("resume", ""),
        ("evaluate", ""),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must be .*; got {value!r}$"):
        RunOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", float("inf"), "a finite number"),
        ("lr", "0.1", "a finite number"),
        ("epochs", 2.5, "an integer"),
        ("epochs", True, "an integer"),
        ("image_size", 16.0, "an integer or None"),
        ("recompute", "no", "True or False"),
        ("data", None, "a string"),
        ("output", 3, "a string or None"),
    ],
)
def test_values_of_other_types_are_named(name: str, value: object, expected: str, unchecked: None):
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} must be {expected}; got {value!r}$"):
        RunOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "near"), [("precision", "bf16", "bf16-mixed"), ("accelerator", "cuda", "cpu")]
)
def test_unknown_names_get_the_known_ones(name: str, value: str, near: str):
    with pytest.raises(InputError, match=f"unknown {name} '{value}'.*'{near}'"):
        RunOptions(**{name: value})


def test_a_batch_must_split_over_the_devices():
    with pytest.raises(InputError, match="6 devices cannot share a batch of 64 images evenly"):
        RunOptions(devices=3, num_nodes=2)


def test_resume_and_evaluate_exclude_each_other():
    with pytest.raises(InputError, match="--resume, --init-from and --evaluate cannot go together"):
        RunOptions(resume="a.ckpt", evaluate="b.ckpt")


def test_what_a_resumed_run_must_share():
    assert set(RunOptions().fixed()) == {
        "image_size",
        "held_out",
        "epochs",
        "batch_size",
        "schedule",
        "lr",
        "momentum",
        "weight_decay",
        "warmup_epochs",
        "norm_weight_decay",
        "label_smoothing",
        "precision",
        "seed",
        "optimizer",
        "optimizer_options",
        "ema",
        "randaugment",
        "mixup",
        "cutmix",
        "clip_grad_norm",
        "accumulate",
    }
