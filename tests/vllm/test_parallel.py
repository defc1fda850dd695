"""Tensor parallel: two processes, each with its own heads, give what one gives."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("vllm")

from tests.vllm.engines import engine, prompts, tokens
from tsa_compile.frontends.vllm.counts import BY_LAYER

SPARSE = {"policy": "BlockSparse", "alpha": 0.3, "last_dense": 0, "window": 64, "min_context": 0}


def counted(worker=None):
    """Runs in each worker."""
    from tsa_compile.frontends.vllm.counts import BY_LAYER

    return {layer: dataclasses.astuple(counts) for layer, counts in BY_LAYER.items()}


def test_two_ranks_give_the_tokens_of_one(model, monkeypatch):
    given = prompts([700, 331, 40, 513])
    BY_LAYER.clear()
    with engine(model, SPARSE, max_num_batched_tokens=512) as llm:
        want, rows = tokens(llm, given), counted()
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(model, SPARSE, max_num_batched_tokens=512, tensor_parallel_size=2) as llm:
        assert tokens(llm, given) == want
        assert llm.collective_rpc(counted) == [rows, rows]
    assert all(counts[3] >= 4 for counts in rows.values())
