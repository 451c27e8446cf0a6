"""Every rule on ResNet-20: the network, and the rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from dnw_graph.analysis.cost import cost
from dnw_graph.wirings import WIRINGS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "paper"


@pytest.fixture(scope="module")
def paper() -> dict[str, ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: __import__(name) for name in ("resnet20", "rules")}
    finally:
        sys.path.remove(str(FOLDER))


def test_resnet_20_is_that_of_he_and_others(paper: dict[str, ModuleType]):
    """He et al. 2016, Table 6: 0.27M parameters; 19 convolutions of 3×3, counted by hand, and a linear layer."""
    model = paper["resnet20"].ResNet20()
    shapes = [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]
    expected = [(3, 16), *6 * [(16, 16)], (16, 32), *5 * [(32, 32)], (32, 64), *5 * [(64, 64)]]
    assert shapes == expected
    places = [*7 * [32**2], *6 * [16**2], *6 * [8**2]]
    products = sum(9 * a * b * n for (a, b), n in zip(expected, places, strict=True)) + 640
    norms = 2 * sum(b for _, b in expected)
    assert sum(p.numel() for p in model.parameters()) == sum(9 * a * b for a, b in expected) + norms + 650
    assert cost(model, (3, 32, 32)).multiply_adds == products


def test_a_shortcut_that_halves_the_resolution_has_no_parameters(paper: dict[str, ModuleType]):
    x = torch.randn(2, 3, 4, 4)
    out = paper["resnet20"].Shortcut()(x)
    assert out.shape == (2, 6, 2, 2)
    for i in range(2):
        for j in range(2):
            assert torch.equal(out[:, :3, i, j], x[:, :, 2 * i, 2 * j])
    assert not out[:, 3:].any()


def test_every_rule_has_its_rows(paper: dict[str, ModuleType]):
    table = paper["rules"].TABLE
    asked = [row.options.get("wiring") for row in table.rows]
    newer = {"set", "rigl", "sparse_momentum", "gmp", "top_kast", "ac_dc"}
    for rule in ("random_graph", "dnw", "no_update", *newer):
        densities = {row.options["density"] for row in table.rows if row.options.get("wiring") == rule}
        assert densities == {"0.05", "0.1"}
    assert asked.count("nm") == asked.count("str") == asked.count(None) == 1
    assert set(asked) - {None} <= set(WIRINGS)
    recipe = {"epochs": 40, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    for row in table.rows:
        configured = table.configured(row)
        assert {name: configured[name] for name in recipe} == recipe


@pytest.mark.parametrize("rule", ["dense", "dnw_0.05", "top_kast_0.05", "ac_dc_0.1", "str", "nm"])
def test_rows_make_networks_of_their_density(paper: dict[str, ModuleType], rule: str):
    """269,722 parameters, of which 268,336 are weights; the share is of them, 2 of 4 but for the 3 colours."""
    row = next(row for row in paper["rules"].TABLE.rows if row.key == f"resnet20_{rule}")
    options = {name: row.options[name] for name in ("wiring",) if name in row.options}
    if "density" in row.options:
        options["density"] = float(row.options["density"])
    if "wiring_options" in row.options:
        options["wiring_options"] = json.loads(row.options["wiring_options"])
    model = paper["resnet20"].ResNet20Options(**options).create(10, 32).eval()
    whole, others = 268_336, 269_722 - 268_336
    kept = {"dnw_0.05": 13_417, "top_kast_0.05": 13_417, "nm": (whole - 432) // 2 + 288}.get(rule, whole)
    if rule == "str":
        assert whole / 2 < cost(model, (3, 32, 32)).parameters - others < whole
    else:
        assert cost(model, (3, 32, 32)).parameters == kept + others
