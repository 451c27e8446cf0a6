"""Types at the public doors: what a hint takes, what it makes of it, and what it says about the rest."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dnw_graph import Discrete, InputError, NeuralGraph, Schedule, TargetedDropout, Wiring
from dnw_graph.arguments import check, check_fields, checked, shown
from dnw_graph.models import MobileNetV1
from dnw_graph.sparse_layers import sparsify

if TYPE_CHECKING:
    from nowhere import Missing


@checked
def door(
    number: int = 1,
    share: float = 0.5,
    switch: bool = True,
    *,
    sizes: Sequence[int] = (1,),
    named: Mapping[str, float] | None = None,
    matrix: Float[Tensor, "2 columns"] | None = None,
    elsewhere: Missing | None = None,
) -> tuple[Any, ...]:
    """Return its arguments."""
    return number, share, switch, sizes, named, matrix, elsewhere


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NAN, INF = math.nan, math.inf
TAKEN = [
    (
        int,
        [
            (3, 3),
            (np.int64(3), 3),
            (np.uint8(3), 3),
            (np.array(3), 3),
            (torch.tensor(3), 3),
            (-(2**63) + 1, -(2**63) + 1),
        ],
    ),
    (float, [(1, 1.0), (0.5, 0.5), (np.float32(0.5), 0.5), (np.int64(2), 2.0)]),
    (bool, [(True, True), (np.bool_(False), False)]),
    (int | float, [(3, 3), (3.0, 3.0), (np.float64(0.5), 0.5)]),
    (float | str, [(1, 1.0), ("gamma", "gamma")]),
    (Sequence[int], [((1, 2), (1, 2)), (range(2), range(2)), ((1, np.int64(2)), (1, 2)), (np.array([1, 2]), [1, 2])]),
    (Iterable[str], [({"a"}, ["a"]), (iter("ab"), ["a", "b"])]),
    (tuple[int, float], [((1, 2), (1, 2.0))]),
    (tuple[int, ...], [((), ()), ((1, np.int8(2)), (1, 2))]),
    (Mapping[str, float], [({"a": 1}, {"a": 1.0}), ({}, {})]),
    (Literal["a", "b"], [("a", "a")]),
    (type[nn.Module], [(nn.ReLU, nn.ReLU)]),
    (Callable[..., int], [(len, len)]),
    (Any, [(None, None)]),
]
REFUSED = [
    (int, "an integer", [True, np.bool_(True), 2.0, np.float64(2), "2", None, NAN, 10**30, [1], torch.ones(2), 1j]),
    (
        float,
        "a finite number",
        [True, np.bool_(True), NAN, INF, np.float32(NAN), "1", None, 1j, 10**400, torch.ones(())],
    ),
    (bool, "True or False", [0, 1, "False", None, np.int64(1), torch.tensor(True), []]),
    (str, "a string", [b"a", 1, None, ["a"]]),
    (int | None, "an integer or None", [1.5, "None", True]),
    (int | float, "a finite number", ["x", None, True, INF]),
    (Sequence[int], "a sequence of integers", ["12", b"12", 3, [1.0], [True], {1, 2}, torch.ones(2), np.ones((2, 2))]),
    (tuple[int, float], "a tuple (an integer, a finite number)", [(1,), (1, 2, 3), [1, 2.0], ("a", 1)]),
    (Mapping[str, float], "a mapping from strings to finite numbers", [[("a", 1)], {1: 1.0}, {"a": "b"}, None]),
    (Literal["a", "b"], "'a' or 'b'", ["c", 1]),
    (str | type[nn.Module], "a string or a subclass of Module", [int, nn.ReLU()]),
    (Callable[..., int], "a callable", [1, "len"]),
    (nn.Module, "a Module", [nn.ReLU, None, torch.ones(2)]),
    (
        Int[Tensor, "2 n"],
        "a tensor Int[Tensor, '2 n']",
        [torch.ones(2, 3), torch.ones(3, 2).long(), np.ones((2, 2), int), [[1]]],
    ),
]


@pytest.mark.parametrize(("hint", "value", "result"), [(hint, *pair) for hint, pairs in TAKEN for pair in pairs])
def test_what_a_hint_takes(hint, value, result):
    found = check("x", value, hint)
    assert type(found) is type(result)
    assert found == result


@pytest.mark.parametrize(("hint", "expected", "value"), [(h, e, value) for h, e, values in REFUSED for value in values])
def test_what_a_hint_refuses(hint, expected, value):
    with pytest.raises(InputError) as refused:
        check("the size", value, hint)
    assert str(refused.value) == f"the size must be {expected}; got {shown(value)}"


def test_dimensions_stand_for_themselves():
    @checked
    def pair(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> None: ...

    pair(torch.ones(2), torch.ones(3))  # what must agree is for the function to say
    with pytest.raises(
        InputError, match=r"pair: b must be a tensor Float\[Tensor, 'n'\]; got a tensor of float32 \[2, 2\]"
    ):
        pair(torch.ones(2), torch.ones(2, 2))


def test_a_checked_function_gets_what_its_hints_say():
    given = door(np.int64(2), 1, np.bool_(False), sizes=np.array([3]), named={"a": 1}, elsewhere="anything")
    assert given == (2, 1.0, False, [3], {"a": 1.0}, None, "anything")
    assert [type(value) for value in given[:3]] == [int, float, bool]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"number": True}, "door: number must be an integer; got True"),
        ({"share": "x" * 1000}, f"door: share must be a finite number; got '{'x' * 79}… (str)"),
        ({"named": {1: 2}}, "door: named must be a mapping from strings to finite numbers or None; got {1: 2}"),
        (
            {"matrix": torch.ones(3, 3)},
            "door: matrix must be a tensor Float[Tensor, '2 columns'] or None; got a tensor of float32 [3, 3]",
        ),
    ],
)
def test_messages_name_the_argument_what_is_expected_and_what_was_given(arguments, message):
    with pytest.raises(InputError) as refused:
        door(**arguments)
    assert str(refused.value) == message


def test_unknown_arguments_are_answered_with_those_that_come_near():
    with pytest.raises(InputError, match="unknown argument of door 'numbers': did you mean 'number'"):
        door(numbers=1)
    with pytest.raises(InputError, match="sparsify takes density, the share of weights to keep, not sparsity"):
        sparsify(nn.Linear(3, 4), sparsity=0.8)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="unknown argument of NeuralGraph 'bloks': did you mean 'blocks'"):
        NeuralGraph(bloks=(3, 4), num_edges=3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="NeuralGraph: blocks must be a sequence of integers or None; got 8"):
        NeuralGraph(blocks=8, num_edges=3)  # type: ignore[arg-type]


def test_missing_arguments_are_errors_of_python():
    with pytest.raises(TypeError, match=r"missing (1 required positional|a required) argument: 'module'"):
        sparsify()  # type: ignore[call-arg]


def test_a_checked_function_looks_like_itself():
    assert str(inspect.signature(door)).startswith("(number: 'int' = 1, share: 'float' = 0.5")
    assert (door.__name__, door.__doc__) == ("door", "Return its arguments.")
    assert list(inspect.signature(Discrete).parameters) == ["steps", "input_mode", "function_per_step"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(2, 3), "a tensor of float32 [2, 3]"),
        (torch.ones(1, device="meta"), "a tensor of float32 [1] on meta"),
        (np.ones((2, 3)), "a NumPy array of float64 [2, 3]"),
        (nn.Sequential(nn.Linear(2, 3)), "a Sequential module"),
        (nn.Linear, "the class Linear"),
        (Unprintable(), "an object of type Unprintable"),
        pytest.param(10**5000, "an object of type int", id="digits"),
        ("a\nb", r"'a\nb'"),
        (None, "None"),
    ],
)
def test_values_in_messages_are_short(value, text):
    assert shown(value) == text


def test_fields_of_a_dataclass():
    @dataclass(frozen=True)
    class Options:
        share: float
        size: int | None = None

        def __post_init__(self) -> None:
            check_fields(self, "--{}".format)

    assert Options(1, np.int8(3)) == Options(1.0, 3)
    assert type(Options(1).share) is float
    with pytest.raises(InputError, match=r"--size must be an integer or None; got 2\.5"):
        Options(1, 2.5)


def test_steps_in_schedules_by_name_stay_steps():
    rule = TargetedDropout(rho={"start": 0.0, "end": 1.0, "begin": np.int64(3), "until": 9})
    assert rule.rho == Schedule(0.0, 1.0, 3, 9)
    assert not rule.rho.in_fractions


# Messages of errors.
def test_a_message_is_one_short_line_whatever_is_in_it():
    error = InputError("cannot read 'x\ny\x1b[31m\udcff.png': " + "z" * 1000 + " give another one")
    assert str(error).startswith(r"cannot read 'x\ny\x1b[31m\udcff.png': zzz")
    assert str(error).endswith("z give another one")
    assert len(str(error)) == 499
    str(error).encode()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


class Faulty(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise InputError("image x is broken: replace it")


def test_an_error_from_a_worker_is_one_line():
    with pytest.raises(InputError, match=r"^image x is broken: replace it$"):
        next(iter(DataLoader(Faulty(), num_workers=1)))


# The doors of graphs and models.
@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.ones(2, 3, 4, 4).numpy(), r"a NumPy array of float32 \[2, 3, 4, 4\]"),
        ([[1.0]], r"\[\[1.0\]\]"),
        (torch.ones(2, 3, 4, 4, dtype=torch.int64), r"a tensor of int64 \[2, 3, 4, 4\]"),
        (torch.ones(2, 3, 4, 4, dtype=torch.float64), r"a tensor of float64 \[2, 3, 4, 4\]"),
        (torch.ones(2, 3, 4, 4, device="meta"), r"a tensor of float32 \[2, 3, 4, 4\] on meta"),
        (torch.ones(3, 4, 4), r"a tensor of float32 \[3, 4, 4\]"),
        (torch.ones(2, 4, 4, 4), r"a tensor of float32 \[2, 4, 4, 4\]"),
    ],
)
@pytest.mark.parametrize("model", [NeuralGraph((3, 4, 2), 9, name="stage2"), MobileNetV1(0.1)], ids=["graph", "model"])
def test_inputs_that_do_not_fit_are_refused(model, x, got, unchecked):
    name = "stage2: the input" if isinstance(model, NeuralGraph) else "the input of MobileNetV1"
    with pytest.raises(InputError, match=rf"^{name} must be a tensor of float32 .*; got {got}$"):
        model(x)


def test_autocast_takes_what_it_converts():
    graph = NeuralGraph((3, 4, 2), 9)
    x = torch.ones(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert graph(x.bfloat16()).shape == graph(x).shape
    with pytest.raises(InputError, match="got a tensor of bfloat16"):
        graph(x.bfloat16())


def test_a_rule_with_an_init_of_its_own():
    class Own(Wiring):
        def __init__(self, share):
            super().__init__()
            self.share = share

        def choose(self, view):
            return self.largest(view, view.k)

    graph = NeuralGraph((3, 4, 2), 9, wiring=Own("anything"))
    assert copy.deepcopy(graph).wiring.share == "anything"


def test_maps_of_one_pixel_and_single_images_have_nothing_to_norm():
    graph = NeuralGraph((3, 4, 2), 9)
    with pytest.raises(InputError, match=r"one value per node in maps \[1, 3, 1, 1\]: in training, give more images"):
        graph(torch.ones(1, 3, 1, 1))
    assert graph(torch.ones(2, 3, 1, 1)).shape == graph.eval()(torch.ones(2, 3, 1, 1)).shape
