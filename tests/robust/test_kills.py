import random
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kills import Case, try_case

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

# Kind, target, times, moment, epochs done, delay.
CASES = {
    "Ctrl-C to the group while it imports": (signal.SIGINT, "group", 1, "import", 0, 0.0),
    "SIGTERM twice while it starts": (signal.SIGTERM, "main", 2, "start", 0, 0.0),
    "Ctrl-C twice to the group while it trains": (signal.SIGINT, "group", 2, "training", 1, 0.1),
    "SIGTERM to one process while it trains": (signal.SIGTERM, "rank", 1, "training", 1, 0.1),
    "the loss of a process": (signal.SIGKILL, "rank", 1, "training", 1, 0.1),
    "the loss of the main process": (signal.SIGKILL, "main", 1, "training", 1, 0.1),
}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_run_ends_as_it_should_and_goes_on(name: str, devices: int):
    kind, target, times, moment, epochs, delay = CASES[name]
    if devices == 1 and target == "rank":
        pytest.skip("there is no other process")
    case = Case(kind, devices, 2, target, times, moment, epochs, delay)
    assert try_case(case, random.Random(0)), "the run ended before it was killed"
    assert not case.reasons
