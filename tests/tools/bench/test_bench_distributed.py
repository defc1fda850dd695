"""Benchmarks of several ranks: on a CPU of a tiny model, so that every number is there; on two GPUs, the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cache.models import tiny
from tests.ranks import run_ranks
from tsa_compile.tools.bench import context_parallel

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[3]


def context_row():
    row = context_parallel.bench_context(tiny("llama", 1), 640, 1.0, repeats=1)
    return row, str(row)


@pytest.mark.slow
def test_one_prompt_alone_and_spread():
    (first, text), (second, _) = run_ranks(2, context_row, limit=120)
    assert first == second
    assert (first.length, first.layers, first.ranks, first.alpha) == (640, 1, 2, 0.0)
    assert first.kept_one == pytest.approx(1.0)
    assert first.kept_spread == pytest.approx(1.0)
    assert first.difference < 1e-5
    assert min(first.one, first.spread) > 0
    assert f"{first.spread / first.one:.3f} of it" in text


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tsa_compile"]
    options = ["--lengths", "8192,10000", "--layers", "2", "--keep", "0.5,1", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "bench", "context-parallel", *options], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "2 ranks" in line]
    assert len(lines) == 4
    assert all(float(line.rpartition(" ")[2]) < 0.05 for line in lines)
