"""Routed attention over NCCL: two GPUs of one host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CAPTURED = """
import torch, torch.distributed as dist
from tsa_compile.kernels.common.group import default_group
from tsa_compile.kernels.common.spread import positions, rows_held
from tsa_compile.tools.bench.tune_distributed import start
device = start()
rank, ranks, length = dist.get_rank(), dist.get_world_size(), 1000
torch.manual_seed(0)
q, k, v = (torch.randn(2, h, n, 64, dtype=torch.bfloat16, device=device) for h, n in ((8, 1), (2, length), (2, length)))
held = positions(rows_held(length, rank, ranks), rank, ranks, device)
rule = ([0.3], [0], 0.0, 1, 3, default_group())
sums, counts = torch.ops.tsa.page_sums(k[:, :, held], None, 1, None, None, None)
mine = k[:, :, held], v[:, :, held]
def step():
    pages = torch.ops.tsa.routed_pages(q, sums, counts, None, None, len(held), 0.1, *rule)
    every = torch.ops.tsa.routed_attention(q, *mine, None, None, None, None, None, 0.1, False, default_group())
    few = torch.ops.tsa.routed_attention(q, *mine, *pages, None, None, None, 0.1, False, default_group())
    return every[0], few[0], pages[1]
eager = step()
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    recorded = step()
graph.replay()
torch.cuda.synchronize()
assert all(torch.equal(a, b) for a, b in zip(eager, recorded, strict=True))
dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.1, enable_gqa=True)
torch.testing.assert_close(eager[0].double(), dense, rtol=0, atol=2e-2)
number = eager[2].clone()
dist.all_reduce(number)
assert number.eq(19).all(), number  # 30 % of 63 pages
print("alike")
del graph, recorded  # while a graph holds its calls, NCCL does not come to an end
torch.cuda.synchronize()
dist.destroy_process_group()
"""


def torchrun(*command: object) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_eager_and_recorded(tmp_path):
    (tmp_path / "captured.py").write_text(CAPTURED)
    assert torchrun(tmp_path / "captured.py").count("alike") == 2


def test_a_model():
    out = torchrun(ROOT / "examples/routed.py")
    assert out.count("Exact: holds") == out.count("PageSparse: holds") == 2
    assert out.count("20 of 20 tokens alike") >= 2
