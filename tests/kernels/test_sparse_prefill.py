"""Token-sparse attention: the CPU path and the Triton engines against the oracle (docs/operators.md)."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.flat import sparse_attention_reference
from tsa_compile.kernels.attend.tokens.definition import sparse_attention_oracle

STRIPS = [(0, 0, 0), (16, 4, 8), (0, 0, 5), (0, 3, 0), (40, 0, 0), (1, 0, 0)]


def make_case(
    lengths,
    k_len,
    q_len,
    heads=4,
    kv_heads=2,
    dim=16,
    v_dim=None,
    per_query_head=True,
    keep=0.5,
    heavy=0,
    padding="left",
    layout="BHSD",
    dtype=torch.float64,
    seed=0,
):
    """Arguments of the operator up to key_mask; `lengths`: real tokens of each row. Heavy tokens are among the kept."""
    rng = torch.Generator().manual_seed(seed)
    batch, groups = len(lengths), heads if per_query_head else kv_heads

    def tensor(h, length, d):
        x = torch.randn(batch, length, h, d, generator=rng, dtype=torch.float64).to(dtype).transpose(1, 2)
        return x if layout == "BSHD" else x.contiguous()

    q, k, v = tensor(heads, q_len, dim), tensor(kv_heads, k_len, dim), tensor(kv_heads, k_len, v_dim or dim)
    mask = torch.zeros(batch, k_len, dtype=torch.bool)
    indices = torch.full((batch, groups, k_len), -1, dtype=torch.int32)
    heavy_indices = torch.full((batch, groups, heavy), -1, dtype=torch.int32)
    counts = torch.zeros(batch, dtype=torch.int32)
    for b, length in enumerate(lengths):
        where = {
            "left": torch.arange(k_len - length, k_len),
            "right": torch.arange(length),
            "holes": torch.randperm(k_len, generator=rng)[:length].sort().values,
        }[padding]
        mask[b, where] = True
        counts[b] = n = length if keep == 1 else round(keep * length)
        for g in range(groups):
            kept = where[torch.randperm(length, generator=rng)[:n].sort().values].int()
            indices[b, g, :n] = kept
            few = kept[torch.randperm(n, generator=rng)[: min(heavy, n)].sort().values]
            heavy_indices[b, g, : len(few)] = few
    key_mask = None if bool(mask.all()) else mask
    return q, k, v, indices, counts, heavy_indices, key_mask


def ragged_cases():
    """Names and arguments of make_case: padding, counts, chunked prefill, head layouts, head dims, empty rows."""
    yield "plain", dict(lengths=[300], k_len=300, q_len=300)
    yield "one token", dict(lengths=[1], k_len=1, q_len=1, keep=1)
    for padding in ("left", "right", "holes"):
        yield f"padding {padding}", dict(lengths=[290, 1, 131], k_len=290, q_len=290, padding=padding)
    yield "empty row", dict(lengths=[120, 0, 64], k_len=120, q_len=120)
    yield "nothing kept", dict(lengths=[100, 70], k_len=100, q_len=100, keep=0)
    yield "everything kept", dict(lengths=[100, 70], k_len=100, q_len=100, keep=1)
    yield "chunked", dict(lengths=[300, 300], k_len=300, q_len=77)
    yield "chunked, sparse", dict(lengths=[300], k_len=300, q_len=5, keep=0.05)
    yield "chunked, padded", dict(lengths=[300, 33, 150], k_len=300, q_len=77, padding="holes")
    yield "chunked, left", dict(lengths=[300, 33, 150], k_len=300, q_len=77)
    yield "one list per KV head", dict(lengths=[200, 90], k_len=200, q_len=200, heads=8, per_query_head=False)
    yield "MHA", dict(lengths=[150], k_len=150, q_len=150, heads=3, kv_heads=3)
    yield "MQA", dict(lengths=[150], k_len=150, q_len=150, heads=8, kv_heads=1)
    yield "head dims", dict(lengths=[140], k_len=140, q_len=140, dim=24, v_dim=40)
    yield "BSHD", dict(lengths=[140, 60], k_len=140, q_len=140, layout="BSHD")


RAGGED = [pytest.param(case, id=name) for name, case in ragged_cases()]


@pytest.mark.parametrize("strip", STRIPS, ids=str)
@pytest.mark.parametrize("case", RAGGED)
def test_reference_equals_the_definition(case, strip):
    window, sinks, heavy = strip
    args = make_case(**case, heavy=heavy)
    expected = sparse_attention_oracle(*args, 0.3, window, sinks, 0)
    result = sparse_attention_reference(*args, 0.3, window, sinks, 0)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reference_computes_in_float32(dtype):
    args = make_case(lengths=[400, 250], k_len=400, q_len=400, dim=64, heavy=8, dtype=dtype)
    expected = sparse_attention_oracle(*(x.double() if x.is_floating_point() else x for x in args[:6]), args[6], 0.125, 32, 4, 0)
    result = sparse_attention_reference(*args, 0.125, 32, 4, 0)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_dense_hint_does_not_change_the_result():
    args = make_case(lengths=[100, 70], k_len=100, q_len=60, keep=1, heavy=4, padding="holes")
    args[5].fill_(-1)
    expected = sparse_attention_oracle(*args, 0.2, 16, 4, 0)
    torch.testing.assert_close(sparse_attention_reference(*args, 0.2, 16, 4, 100), expected, rtol=0, atol=1e-12)


def test_heavy_tokens_outside_the_kept_set():
    """The operator does not demand that heavy tokens are kept, nor that they avoid the window and the sinks."""
    args = list(make_case(lengths=[200, 120], k_len=200, q_len=200, heavy=6, keep=0.3, padding="right"))
    args[5] = torch.tensor([0, 1, 5, 60, 118, -1], dtype=torch.int32).expand(2, 4, 6).contiguous()
    expected = sparse_attention_oracle(*args, 0.2, 16, 3, 0)
    torch.testing.assert_close(sparse_attention_reference(*args, 0.2, 16, 3, 0), expected, rtol=0, atol=1e-12)
