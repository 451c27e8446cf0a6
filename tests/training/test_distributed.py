from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dnw_graph
from dnw_graph.training import ImageData, RunOptions, read_checkpoint, run


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_learn_one_wiring(
    tmp_path: Path,
    create: Callable[[int, int], nn.Module],
    small_digits: ImageData,
    options: Callable[..., RunOptions],
):
    packages = str(Path(dnw_graph.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("two_processes.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, check=True, timeout=300)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["real_index"], second["real_index"])
    for name, parameter in create(10, 8).named_parameters():
        assert torch.equal(first["state_dict"][name], second["state_dict"][name]), name
        assert not torch.equal(first["state_dict"][name], parameter), name
    assert first["top1"] == second["top1"]
    last = tmp_path / "run" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 8
    # One process counts the same right answers over all test images as two did over their shares.
    alone = run(create, {}, options(evaluate=str(last), output=None), small_digits)
    assert alone.top1 == first["top1"]
