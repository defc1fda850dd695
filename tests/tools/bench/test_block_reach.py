"""What the benchmark of block-sparse prefill looks for, on a CPU: alphas at an error, by head, and its table."""

from __future__ import annotations

import pytest
import torch

from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.tools.bench.block_reach import CASES, GRID, at_error, spread, table
from tsa_compile.tools.bench.block_sparse import Inputs, errors, exact_last, run
from tsa_compile.tools.bench.structured_inputs import structured_heads


@pytest.fixture(scope="module")
def inputs():
    q, k, v, rows = structured_heads(1200, 4, 2, 32, "cpu", torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return Inputs(q, k, v, rows, dense, exact_last(q, k, v), {})


def policy_of(alpha):
    return BlockSparse(alpha=alpha, window=64, last_dense=0)


def test_the_largest_alpha_within_an_error(inputs):
    error = lambda policy: errors(run(inputs, policy)[0], inputs.dense, inputs.last, inputs.needle_rows)["err_all"]  # noqa: E731
    most = error(policy_of(0.95))
    found = at_error(inputs, 0.5 * most, policy_of, 1e-3, 0.95)
    assert error(found) <= 0.5 * most < error(policy_of(min(1.1 * found.alpha, 0.95)))
    assert at_error(inputs, 2 * most, policy_of, 1e-3, 0.95).alpha == 0.95
    with pytest.raises(ValueError, match="at the smallest alphas, above 1e-05"):
        at_error(inputs, 1e-5, policy_of, 0.5, 0.95)


def test_pairs_are_spread_where_they_lower_the_error_most():
    """Head 1 needs no pairs; head 0's error falls with every step."""
    steps = torch.arange(len(GRID), dtype=torch.float64)
    pairs = torch.stack([0.1 + 0.05 * steps, 0.1 + 0.05 * steps], 1)
    error = torch.stack([0.1 * 0.5**steps, 0 * steps], 1)
    alphas = spread(error, torch.tensor([0.5, 0.5], dtype=torch.float64), pairs, 0.1 * 0.5**4)
    assert alphas == (GRID[4], GRID[0])


def test_the_table_has_every_ratio():
    row = {
        "case": "128K, 11 %", "way": "one", "dense_ms": {"SDPA": 244.3, "FlashAttention-4": 212.0}, "ms": 20.0, "means_ms": 0.2,
        "select_ms": 0.8, "attend_ms": 10.0, "pairs": 0.1, "err_all": 0.11, "err_worst_head": 0.18,
    }  # fmt: skip
    line = table({"a": row, "b": row | {"dense_ms": {"SDPA": 100.0}}}).splitlines()
    assert "| 12.21x | 10.60x | 12.0x | 9.3x | 10.0 % | 11.0 % | 18 % | 10 % | 1407 |" in line[2]
    assert "not installed" in line[3]
    assert {case.dim for case in CASES.values()} == {64, 128, 256}
