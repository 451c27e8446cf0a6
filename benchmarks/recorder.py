"""Times the recorder of wirings, compared with the training steps between two moments.

MobileNetV1-DNW trains on random images, from its first step, when most edges change. For each n, a ``Recording`` adds a
moment after every n steps; the share is its time divided by the time of the n steps. Run with
``python benchmarks/recorder.py --threads 2``.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from timing import arguments, report

from dnw_graph.models import MobileNetV1DNW
from dnw_graph.visualize import Recording


def main() -> None:
    """Time every n and print one row for each."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 5, 10, 20], help="steps between moments")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [_row(every, options.rounds, options.batch, options.device) for every in options.every]
    report("Recorder: MobileNetV1-DNW ×0.225 at 32 × 32", rows, options)


def _row(every: int, rounds: int, batch: int, device: torch.device) -> dict[str, object]:
    torch.manual_seed(0)
    model = MobileNetV1DNW(width=0.225, num_classes=10, stem_stride=1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    x, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    recording = Recording(model)
    steps, adds = [], []
    for moment in range(rounds + 1):
        for _ in range(every):
            start = _now(device)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            steps.append(_now(device) - start)
        start = _now(device)
        recording.add((moment + 1) * every)
        adds.append(_now(device) - start)
    # The first step and the first moment warm up.
    step, add = statistics.median(steps[1:]), statistics.median(adds[1:])
    changed = sum(int(graph.swaps()[-1].sum()) for graph in recording.graphs.values())
    return {
        "n": every,
        "step, ms": 1e3 * step,
        "moment, ms": 1e3 * add,
        "share": f"{add / (every * step):.2%}",
        "born and gone, last": changed,
        "recording, KB": len(recording.to_bytes()) / 1e3,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
