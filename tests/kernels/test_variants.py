"""After a warm-up no call compiles a kernel: told from what the hosts would launch, on GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def not_warmed(capability: str, processors: int, *policies: str) -> dict[str, list]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.variants", capability, str(processors), *policies]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_warm_up_has_every_kernel():
    """66 multiprocessors: batches of 1 to 6 rows of 32 heads meet every way of a Hopper GPU to score keys by the last queries."""
    found = not_warmed("9.0", 66, "BlockSparse", "TokenSparse", "Exact")
    assert found == {"BlockSparse": [], "TokenSparse": [], "Exact": []}


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "processors"), [("8.0", 108), ("8.6", 84), ("8.9", 58), ("9.0", 132), ("12.0", 170)])
def test_of_every_policy_on_every_gpu(capability, processors):
    found = not_warmed(capability, processors)
    assert found
    assert not any(found.values()), found
