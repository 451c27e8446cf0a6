"""Exact selection of the candidates with the largest magnitude."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dnw_graph.arguments import checked
from dnw_graph.errors import InputError
from dnw_graph.ops.call import run
from dnw_graph.ops.operands import check_memory

# With fewer candidates, guessing from a sample saves nothing; with more, one weight in _SAMPLE_STRIDE is sampled.
_SAMPLE_FROM = 1 << 16
_SAMPLE_STRIDE = 61
_MARGINS = range(2, 31)  # Possible margins around a guess, as powers of 1/2.
# For each dtype, the integer dtype of the same size, and the bits of infinity.
_BITS = {
    torch.float16: (torch.int16, 0x1F << 10),
    torch.bfloat16: (torch.int16, 0xFF << 7),
    torch.float32: (torch.int32, 0xFF << 23),
    torch.float64: (torch.int64, 0x7FF << 52),
}


@checked
def select_top_k(weight: Float[Tensor, " candidates"], k: int, name: str = "graph") -> Int[Tensor, " edges"]:
    """Return the flat indices of the k weights of largest |w|, ascending.

    Line 5 of the paper's Algorithm 1: τ is the k-th largest magnitude, every candidate above τ is chosen, and among
    those equal to τ the ones with the lower index, so that exactly k are chosen on every device.

    Args:
        weight: Candidate weights.
        k: Number of edges, 1 … number of candidates.
        name: Name of the graph, for messages.

    Raises:
        InputError: If k is out of range or a weight is NaN or infinite.
    """
    selector, flag = Selector(), new_flag(weight.device)
    index = selector.select(weight, k, name, flag)
    selector.raise_non_finite(flag)
    return index


def largest_along(magnitude: Shaped[Tensor, ...], k: int, dim: int) -> Bool[Tensor, ...]:
    """Return which values are among the k largest of their vector along a dimension, ties to the lower index."""
    threshold = magnitude.topk(k, dim, sorted=False).values.amin(dim, keepdim=True)
    above, ties = magnitude > threshold, magnitude == threshold
    return above | (ties & (ties.cumsum(dim) <= k - above.sum(dim, keepdim=True)))


def new_flag(device: torch.device | None = None) -> Int[Tensor, ""]:
    """Return a cleared flag for :class:`Selector`."""
    with torch.inference_mode(False):  # Tensors made in inference mode cannot be written to in training.
        return torch.zeros((), dtype=torch.int64, device=device)


class Selector:
    """A faster :func:`select_top_k` for repeated use: each selection starts from the last threshold.

    On a CPU all weights are compared with two guesses, slightly below and above the last threshold, and only the few in
    between are ranked. Wrong guesses are replaced by estimates from a sample of the weights; the result is always that
    of a full sort. On other devices all shapes follow from the number of weights and k, and nothing synchronises:
    weights that are not finite set a flag on the device, which :meth:`raise_non_finite` reads. The flag is the caller's
    tensor and is written in place, so that its address in a CUDA graph stays valid.

    Copies and pickles start without a threshold.
    """

    def __init__(self) -> None:
        with torch.inference_mode(False):  # Tensors made in inference mode cannot be written to in training.
            self._carried = torch.tensor([-1, 14, 14], device="cpu")
        # Name and number of weights of the last selection on a device.
        self._flagged: tuple[str, int] | None = None
        self._not_finite = 0

    def select(
        self, weight: Float[Tensor, " candidates"], k: int, name: str, flag: Int[Tensor, ""]
    ) -> Int[Tensor, " edges"]:
        """Return the flat indices of the k weights of largest |w|, ascending, ties to the lower index.

        Args:
            weight: Candidate weights.
            k: Number of edges, 1 … number of candidates.
            name: Name of the graph, for messages.
            flag: On the device of the weights; receives the number of weights that are not finite, except on a CPU.

        Raises:
            InputError: If k is out of range or, on a CPU, a weight is NaN or infinite.
        """
        if _on_host(weight):
            return _select(weight.detach(), k, name, self._carried)
        _check(weight, k, name)
        magnitude = _magnitude(weight)
        _raise_flag((magnitude >= _BITS[weight.dtype][1]).sum(), flag)
        # Only written in a step: reading changing values would cause recompilations.
        self._not_finite, self._flagged = 0, (name, weight.numel())
        return _ranked(magnitude, k)

    def raise_non_finite(self, flag: Int[Tensor, ""]) -> None:
        """Read and clear the flag. Synchronises with the device.

        Args:
            flag: The flag that was passed to the selections.

        Raises:
            InputError: If weights of a selection were NaN or infinite; repeated until the next selection.
        """
        if self._flagged is None or flag.is_meta:
            return
        if found := int(flag):
            self._not_finite = found
            flag.zero_()
        if self._not_finite:
            raise _not_finite(*self._flagged, self._not_finite)

    def forget(self, flag: Int[Tensor, ""]) -> None:
        """Reset the cached threshold and the error flag.

        Args:
            flag: The flag that was passed to the selections.
        """
        self._carried[0] = -1
        self._not_finite = 0
        flag.zero_()

    def __reduce__(self) -> tuple[type[Selector], tuple[()]]:
        return Selector, ()


def _check(weight: Tensor, k: int | torch.SymInt, name: str) -> None:
    if weight.dim() != 1 or weight.dtype not in _BITS or weight.layout is not torch.strided:
        raise InputError(
            f"{name}: expected one weight for each candidate, dense, of {', '.join(map(str, _BITS))}; got "
            f"{list(weight.shape)} of {weight.dtype}, {weight.layout}"
        )
    check_memory(weight.shape)
    if not 1 <= k <= weight.numel():
        raise InputError(f"{name}: cannot choose {k} edges among {weight.numel()} candidates")


def _on_host(weight: Tensor) -> bool:
    """Return whether the host can read values without synchronising."""
    return weight.device.type == "cpu"


def _magnitude(weight: Tensor) -> Tensor:
    """Return the bits of |w| as integers, which have the order of |w|; values that are not finite come last."""
    return weight.detach().abs().view(_BITS[weight.dtype][0])


def _ranked(magnitude: Int[Tensor, " candidates"], k: int) -> Int[Tensor, " edges"]:
    """Return the indices of the k largest, ascending, ties to the lower index; no shape depends on a value."""
    if k == magnitude.numel():
        return torch.arange(k, device=magnitude.device)
    chosen = largest_along(magnitude, k, 0)
    return torch.searchsorted(chosen.cumsum(0), torch.arange(1, k + 1, device=magnitude.device))


@torch.library.custom_op(
    "dnw_graph::select",
    mutates_args=("carried",),
    schema="(Tensor weight, SymInt k, str name, Tensor(a!) carried) -> Tensor",
)
def _select(weight: Tensor, k: int, name: str, carried: Tensor) -> Tensor:
    """Select on a CPU; ``carried`` holds the last threshold, or -1, and the margins below and above it."""
    _check(weight, k, name)
    if carried.shape != (3,) or carried.dtype != torch.int64:
        raise InputError(f"{name}: expected three int64 carried; got {list(carried.shape)} of {carried.dtype}")
    weight = weight.contiguous()
    infinity = _BITS[weight.dtype][1]
    if k == weight.numel():
        _largest(weight, k, infinity, infinity, name)
        return torch.arange(k)
    last, below, above = carried.tolist()
    if not (-1 <= last < infinity and below in _MARGINS and above in _MARGINS):
        last, below, above = -1, _MARGINS.start, _MARGINS.start
    for low, high in _guesses(weight, k, last, below, above):
        index, threshold, reaching, chosen = _largest(weight, k, low, high, name)
        below, above = _adapted(below, reaching - k, k), _adapted(above, k - chosen, k)
        if chosen < k <= reaching:
            break
    carried.copy_(torch.tensor([threshold, below, above]))
    return index


@_select.register_fake
def _(weight: Tensor, k: int | torch.SymInt, name: str, carried: Tensor) -> Tensor:
    _check(weight, k, name)
    return weight.new_empty(k, dtype=torch.int64)


@_select.register_vmap
def _(info: Any, in_dims: Sequence[Any], weight: Tensor, k: int, name: str, carried: Tensor) -> tuple[Tensor, int]:
    """Select for each of several graphs, whose thresholds are independent."""
    return torch.stack([_select(each, k, name, carried.clone()) for each in weight.unbind(in_dims[0])]), 0


@torch.library.custom_op(
    "dnw_graph::raise_flag", mutates_args=("flag",), schema="(Tensor not_finite, Tensor(a!) flag) -> ()"
)
def _raise_flag(not_finite: Tensor, flag: Tensor) -> None:
    """Keep the larger number. An operator, since ``torch.func`` forbids other writes to captured tensors."""
    flag.clamp_(min=not_finite)


@_raise_flag.register_fake
def _(not_finite: Tensor, flag: Tensor) -> None:
    pass


@_raise_flag.register_vmap
def _(info: Any, in_dims: Sequence[Any], not_finite: Tensor, flag: Tensor) -> tuple[None, None]:
    """Keep a number for each of several graphs, or the largest one if they share the flag."""
    _raise_flag(not_finite.amax() if in_dims[1] is None else not_finite, flag)
    return None, None


def _guesses(weight: Tensor, k: int, last: int, below: int, above: int) -> Iterator[tuple[int, int]]:
    """Guess two magnitudes between which the k-th largest lies; the last guess is always right."""
    infinity = _BITS[weight.dtype][1]
    if last >= 0:
        yield max(last - (infinity >> below), 0), min(last + (infinity >> above), infinity)
    if weight.numel() >= _SAMPLE_FROM:
        sample = _magnitude(weight[::_SAMPLE_STRIDE])
        expected = k * sample.numel() / weight.numel()
        margin = 4 * expected**0.5 + 1
        ranks = [int(expected + margin), max(int(expected - margin), 1)]
        if ranks[0] < sample.numel():
            ranked = torch.topk(sample, ranks[0]).values
            yield int(ranked[ranks[0] - 1]), int(ranked[ranks[1] - 1]) + 1
    yield 0, infinity


def _adapted(margin: int, ranked: int, k: int) -> int:
    """Return the next margin, a power of 1/2; it adapts to how fast the weights change.

    Args:
        margin: The last margin.
        ranked: Number of weights between the threshold and the guess; at most 0 if the guess was wrong.
        k: Number of edges.
    """
    step = -3 if ranked <= 0 else (ranked > k // 8 + 64) - (ranked < k // 32)
    return min(max(margin + step, _MARGINS.start), _MARGINS.stop - 1)


def _largest(weight: Tensor, k: int, low: int, high: int, name: str) -> tuple[Tensor, int, int, int]:
    """Return the indices of the k largest, the k-th largest, and how many weights reach the lower and the upper guess.

    If fewer than k reach the lower guess, or k or more the upper one, only these two numbers are valid.

    Raises:
        InputError: If a weight is NaN or infinite.
    """
    index, found = torch.empty(k, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    if run("largest", (weight.numel(), k, low, high), weight, index, found):
        reaching, chosen, not_finite, threshold = found.tolist()
    else:
        magnitude = _magnitude(weight)
        not_finite = int((magnitude >= _BITS[weight.dtype][1]).sum())
        # NumPy is several times faster than torch.nonzero.
        index = torch.from_numpy(np.flatnonzero((magnitude >= low).numpy()))
        reaching, chosen, threshold = index.numel(), 0, 0
        if reaching >= k:
            magnitude = magnitude[index]
            best = _ranked(magnitude, k)
            index, threshold = index[best], int(magnitude[best].min())
    if not_finite:
        raise _not_finite(name, weight.numel(), not_finite)
    return index, threshold, reaching, chosen


def _not_finite(name: str, count: int, not_finite: int) -> InputError:
    return InputError(
        f"{name}: {not_finite} of {count} candidate weights are NaN or infinite; "
        "lower the learning rate or check the inputs of the loss"
    )
