"""Key blocks by the roles of heads: what each row reads, by the bitmap and by the attention that follows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tsa_compile.kernels import kept, ops  # noqa: F401
from tsa_compile.kernels.common.row_blocks import valid_keys, valid_range

_spec = importlib.util.spec_from_file_location("page_cases", Path(__file__).with_name("page_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)
LOCAL = (True, False, False, True)


def seen_by(case, window, sinks):
    """bool `[B, H, Lq, Lk]`: a local head reads what lies in a key block that a window of its row block, or a sink, touches."""
    (batch, heads, q_len, _), k_len = case.q.shape, case.k.shape[2]
    first, end = valid_range(batch, k_len, case.start, case.lengths, torch.device("cpu"))
    at, key = torch.arange(k_len - q_len, k_len)[:, None], torch.arange(k_len)
    seen = ((key <= at) & valid_keys(k_len, first, end, case.key_mask)[:, None])[:, None].repeat(1, heads, 1, 1)
    oldest = (at // 128 * 128 - window + 1).clamp(min=0) // 64 * 64
    last_own = ((end - 1).clamp(min=0) // 128 * 128)[:, None, None]
    near = (key >= oldest) | (
        (key >= last_own) & (key < last_own + 128) & (at >= last_own)
    )  # rows of right padding: see own_keys
    sink = (key // 64 * 64 < (first + sinks)[:, None, None]) & (sinks > 0)
    seen[:, [h for h in range(heads) if LOCAL[h]]] &= (near | sink)[:, None]
    return seen


@pytest.mark.parametrize("padding", [None, "left", "right", "holes"])
@pytest.mark.parametrize(("q_len", "k_len", "window", "sinks"), [(700, 700, 100, 4), (300, 517, 1, 0), (400, 400, 10**6, 70)])
def test_each_head_reads_what_its_role_says(padding, q_len, k_len, window, sinks):
    case = cases.make_case(q_len, k_len, batch=2, padding=padding)
    bits = torch.ops.tsa.role_key_blocks(case.q, case.k, case.start, case.lengths, LOCAL, window, sinks)
    want = seen_by(case, window, sinks)
    assert torch.equal(cases.visible_keys(case, bits), want)
    rest = (None, 1, case.start, case.lengths, case.key_mask, case.scale, False)
    out = torch.ops.tsa.key_block_attention(case.q, case.k, case.v, bits, *rest)[0]
    torch.testing.assert_close(out, cases.dense_attention(case, want)[0])
    read, of = kept.key_blocks(bits, (case.q, case.k), {})
    assert (read <= of).all()
    if padding is None and window < k_len:
        assert (read < of).all()


def test_few_queries_over_a_cache_have_no_local_heads():
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 700, 8)
    few = torch.ops.tsa.role_key_blocks(q, k, None, None, LOCAL, 30, 4, min_queries=16)
    assert torch.equal(few[:, 0], few[:, 1])
    some = torch.ops.tsa.role_key_blocks(q, k, None, None, LOCAL, 30, 4)
    assert not torch.equal(some[:, 0], some[:, 1])


def test_opcheck_and_errors():
    q, k = torch.randn(1, 4, 200, 8), torch.randn(1, 2, 260, 8)
    torch.library.opcheck(torch.ops.tsa.role_key_blocks.default, (q, k, None, None, LOCAL, 30, 4))
    with pytest.raises(ValueError, match="local must be 4 bools, window at least 1"):
        torch.ops.tsa.role_key_blocks(q, k, None, None, LOCAL[:2], 30, 4)
