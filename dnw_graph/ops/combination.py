"""Linear combinations of the stages of a solver's step, and its error norm, each in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dnw_graph.ops.call import run
from dnw_graph.ops.signatures import PIECE


def combination(base: Tensor | None, coefficients: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Return base + Σ c_n x_n of contiguous tensors of one shape.

    Args:
        base: The tensor to add to, or None.
        coefficients: c, one number per term.
        terms: x, at least one.
    """
    out = torch.empty_like(terms[0])
    flat = [term.view(-1) for term in terms]
    start = None if base is None else base.view(-1)
    if run("combination", (out.numel(), len(terms)), start, coefficients, flat, out.view(-1)):
        return out
    total = torch.zeros_like(terms[0]) if base is None else base
    for coefficient, term in zip(coefficients.tolist(), terms, strict=True):
        total = torch.add(total, term, alpha=coefficient)
    return total


def error_norm(
    coefficients: Tensor, terms: Sequence[Tensor], before: Tensor, after: Tensor, rtol: float, atol: float
) -> float:
    """Return the root mean square of e / (atol + rtol · max(|y|, |z|)), with e = Σ c_n x_n, of contiguous tensors.

    Args:
        coefficients: c, one number per term.
        terms: x, the stages of a step.
        before: y, the state before the step.
        after: z, the state after it.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """
    count = before.numel()
    squares = torch.empty((count + PIECE - 1) // PIECE, dtype=torch.float64, device=before.device)
    states = before.view(-1), after.view(-1)
    numbers = (count, len(terms), float(rtol), float(atol))
    if run("error_squares", numbers, coefficients, [term.view(-1) for term in terms], *states, squares):
        return math.sqrt(squares.sum().item() / count)
    error = combination(None, coefficients, terms)
    return (error / (atol + rtol * torch.max(before.abs(), after.abs()))).double().square().mean().sqrt().item()
