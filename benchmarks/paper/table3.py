"""Table 3 of the paper: parameters and FLOPs of its models for ImageNet, compared with those counted here.

    python benchmarks/paper/table3.py

Nothing is trained. Which nodes are dead depends on the learned wiring, so a MobileNetV1-DNW row shows the upper bound,
without dead nodes, unless you give a checkpoint of a run of its configuration in examples/configs:

    python benchmarks/paper/table3.py --checkpoint mobilenet_v1_dnw_x0.225=runs/dnw/last.ckpt

Models of other papers are compared with the nearest one in torchvision or, if it is installed, in timm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import torch
from table3_rows import NAMES, ROWS, SIDE, Row
from torch import nn

from dnw_graph import InputError
from dnw_graph.analysis.cost import cost
from dnw_graph.errors import unknown_name
from dnw_graph.models import create_model
from dnw_graph.whole_file import write_whole

TITLE = f"Table 3: models for ImageNet, images of {SIDE} pixels"
TOLERANCE = 0.02
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Counted:
    """The counts for a row.

    Attributes:
        what: The model, or why there is none.
        parameters: Number of parameters, without nodes that have no path to an output.
        multiply_adds: Multiply-adds for one image, likewise.
        paper_parameters: Number of parameters by the paper's count: without norms, and without its dead nodes.
        paper_multiply_adds: Multiply-adds by the paper's count.
        verdict: ``agrees``, ``differs``, ``upper bound``, ``other model`` or ``cited only``.
    """

    what: str
    parameters: int | None = None
    multiply_adds: int | None = None
    paper_parameters: int | None = None
    paper_multiply_adds: int | None = None
    verdict: str = "cited only"


def interval(printed: str) -> tuple[float, float]:
    """Return the numbers that round to a printed one in millions, such as ``"55.7M"``."""
    digits = printed.removesuffix("M")
    half = Fraction(1, 2 * 10 ** len(digits.partition(".")[2]))
    return float(1_000_000 * (Fraction(digits) - half)), float(1_000_000 * (Fraction(digits) + half))


def agrees(counted: int, printed: str | None) -> bool:
    """Return whether a count lies within 2% of the numbers that round to the printed one."""
    if printed is None:
        return True
    low, high = interval(printed)
    return low * (1 - TOLERANCE) <= counted <= high * (1 + TOLERANCE)


def load(row: Row, path: Path, model: nn.Module) -> None:
    """Load the weights and the wiring of a checkpoint into a row's model.

    Raises:
        InputError: If it is not a checkpoint of this model.
    """
    from dnw_graph.training import read_checkpoint

    checkpoint = read_checkpoint(path)
    found = checkpoint["dnw_graph"]["options"]
    expected = {"model": row.options["name"]} | {key: row.options[key] for key in ("width", "small", "wiring")}
    wrong = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in expected.items() if found.get(key) != value]
    if wrong:
        raise InputError(f"{path} is not a checkpoint of {row.name}: it has {', '.join(wrong)}")
    weights = {
        key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items() if key.startswith("model.")
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit {row.name} with {NUM_CLASSES:,} classes: train it on ImageNet"
        ) from error


def count(row: Row, checkpoint: Path | None = None) -> Counted:
    """Count a row's model, or the nearest one."""
    if row.nearest is None and row.name is None:
        return Counted("in neither torchvision nor timm")
    if row.nearest is not None and importlib.util.find_spec(row.nearest.library) is None:
        return Counted(f"{row.nearest}: not installed")
    torch.manual_seed(0)
    side = SIDE if row.nearest is None else row.nearest.side
    model = create_model(**row.options, num_classes=NUM_CLASSES) if row.nearest is None else row.nearest.build()
    if checkpoint is not None:
        load(row, checkpoint, model)
    bound = row.options.get("wiring") == "dnw" and checkpoint is None
    ours, paper = (cost(model, (3, side, side), paper=paper, dead_nodes=bound) for paper in (False, True))
    good = agrees(paper.parameters, row.parameters) and agrees(paper.multiply_adds, row.flops)
    verdict = "upper bound" if bound else "agrees" if good else "other model" if row.nearest else "differs"
    wirings = {"dnw": "nothing dead", "random_graph": "random graph, seed 0"}
    what = str(row.nearest or wirings.get(row.options.get("wiring", ""), "dense"))
    what = what if checkpoint is None else f"checkpoint {checkpoint}"
    return Counted(what, ours.parameters, ours.multiply_adds, paper.parameters, paper.multiply_adds, verdict)


HEADER = (
    *("model", "paper: params", "FLOPs", "top-1, %", "counted here", "parameters", "multiply-adds"),
    *("paper's count: parameters", "multiply-adds", "result"),
)


def lines(results: Sequence[tuple[Row, Counted]]) -> list[str]:
    """Return the table in Markdown, and an explanation of every figure that is not the paper's."""
    table: list[tuple[str, ...]] = [HEADER]
    for row, counted in results:
        figures = (counted.parameters, counted.multiply_adds, counted.paper_parameters, counted.paper_multiply_adds)
        numbers = [
            "" if figure is None else f"{figure / 1e6:.{2 - place % 2}f}M" for place, figure in enumerate(figures)
        ]
        table.append(
            (row.model, row.parameters or "", row.flops, f"{row.top1}", counted.what, *numbers, counted.verdict)
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |" for cells in table]
    text += [
        "",
        "parameters, multiply-adds: real edges and live nodes only, one image. Paper's count: no parameters of norms; "
        "dead is a node without an output edge in its stage. The result is for the paper's count: agrees means "
        f"within {TOLERANCE:.0%} of values that round to the paper's figures.",
        "",
    ]
    notes = [(f"{row.model}: {counted.verdict}", _why(row, counted)) for row, counted in results]
    return text + [f"{what}: {why}." for what, why in notes if why]


def _why(row: Row, counted: Counted) -> str:
    """Return why a row differs from the paper's, if it does."""
    if counted.verdict == "agrees":
        return ""
    if counted.verdict == "upper bound":
        return f"which nodes die is learned; give --checkpoint {row.name}=PATH"
    if counted.verdict == "cited only":
        return counted.what
    if counted.what.startswith("checkpoint"):
        return f"the dead nodes are those of this run's wiring; {row.note or 'the paper trained another'}"
    return row.note


def _checkpoints(arguments: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not path:
            raise InputError(f"--checkpoint takes NAME=PATH, such as {NAMES[0]}=runs/last.ckpt; got {argument!r}")
        if name not in NAMES:
            raise unknown_name("row", name, NAMES)
        found[name] = Path(path)
    return found


def _write(path: Path, results: Sequence[tuple[Row, Counted]]) -> None:
    libraries = [name for name in ("torch", "torchvision", "timm") if importlib.util.find_spec(name)]
    rows = [
        {"model": row.model, "paper": {"parameters": row.parameters, "flops": row.flops, "top1": row.top1}}
        | {"name": row.name, **asdict(counted), "why": _why(row, counted)}
        for row, counted in results
    ]
    content = {"title": TITLE, "versions": {name: version(name) for name in libraries}, "rows": rows}
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode(), "--json")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"count a trained wiring; NAME is one of {', '.join(NAMES)}",
    )
    options = parser.parse_args(argv)
    try:
        checkpoints = _checkpoints(options.checkpoint)
        if options.json is not None and not options.json.parent.is_dir():
            raise InputError(f"--json: the directory {options.json.parent} does not exist")
        results = [(row, count(row, checkpoints.get(row.name or ""))) for row in ROWS]
        print("\n".join([TITLE, "", *lines(results)]))
        if options.json is not None:
            _write(options.json, results)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
