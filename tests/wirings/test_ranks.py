"""Two processes with half a batch each have the same edges, those of one process with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_two_ranks_are_one_process_with_the_joined_batch(tmp_path):
    program = Path(__file__).with_name("ranks.py")
    runs = [subprocess.Popen([sys.executable, program, tmp_path, str(rank)]) for rank in range(2)]
    assert [run.wait(500) for run in runs] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    alone = first.pop("alone")
    for name, (edges, state) in first.items():
        assert edges == second[name][0] == alone[name][0], name
        for key, value in state.items():
            assert torch.equal(value, second[name][1][key]), (name, key)
            torch.testing.assert_close(value, alone[name][1][key], rtol=1e-7, atol=1e-9, msg=f"{name}: {key}")
        assert len({str(each) for each in edges}) > (1 if name == "targeted_dropout" else 2), name
