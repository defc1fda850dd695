"""The benchmark of rollouts, on a tiny model: what it counts, not how long it takes."""

from __future__ import annotations

import pytest
import torch

from tests.api.tiny import tiny_llama
from tsa_compile.tools.bench.rollouts import EXACT, bench_rollout, told


@pytest.mark.slow
def test_rows_of_a_tiny_model():
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=3, max_position_embeddings=4096)
    exact, sparse = bench_rollout(model, ["sparrow-1.7b-0.75"], batch=2, past=1600, new=12, repeats=1)
    assert (exact.decode, exact.pages, exact.speedup) == (EXACT, 1.0, 1.0)
    assert sparse.pages == pytest.approx(32 / 101, abs=0.005)  # 29 and 3 reserved of 101 pages
    assert sparse.tokens_per_second == pytest.approx(2e3 / sparse.step_ms)
    assert sparse.speedup == pytest.approx(exact.step_ms / sparse.step_ms)
    assert sparse.replayed == 0  # on a CPU
    assert told(sparse).startswith("sparrow-1.7b-0.75: 2 samples behind 1600 tokens, 31.7% of the pages")


def test_too_few_tokens():
    with pytest.raises(ValueError, match="new must be above 8, got 8"):
        bench_rollout(None, [], 1, 1, 8)
