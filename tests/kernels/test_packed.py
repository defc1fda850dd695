"""Engine `packed`: packing, a dense engine in PyTorch on the packed rows, and the way back, in chunks of heads; and which heads
run together."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.kernels.flat import packed_attention
from tsa_compile.kernels.attend.tokens import chunks
from tsa_compile.kernels.attend.tokens.definition import sparse_attention_oracle
from tsa_compile.kernels.attend.tokens.engines import InnerEngine

pytest.importorskip("triton")
_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("test_sparse_prefill.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dense(q, k, v, counts, scale, need_lse):
    """Causal attention over all packed rows, of which those behind the count are finite for some way and then anything."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
    scores = (scale * q.double() @ k.mT).masked_fill(
        ~torch.ones(q.shape[2], k.shape[2], device=q.device).tril().bool(), -torch.inf
    )
    out, lse = scores.softmax(-1) @ v.nan_to_num(), scores.logsumexp(-1)
    for b, n in enumerate(counts.tolist()):
        assert torch.isfinite(k[b, :, : n + chunks.TAIL]).all()
        assert torch.isfinite(v[b, :, : n + chunks.TAIL]).all()
        out[b, :, n:] = torch.nan
    return out.to(q.dtype), lse.float() if need_lse else None


STUB = InnerEngine("stub", lambda q, v: None, dense)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("lists", "strip", "chunk_bytes"),
    [("head", (0, 0, 0), 1), ("head", (16, 4, 8), 1 << 30), ("group", (0, 0, 0), 1 << 30), ("group", (16, 4, 8), 1)],
    ids=str,
)
def test_packed_rows_come_back(lists, strip, chunk_bytes, poisoned, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    shape = dict(lengths=[270, 41, 0], k_len=270, q_len=270, padding="holes", per_query_head=lists == "head", heavy=strip[2])
    args = [None if x is None else x.to(DEVICE) for x in cases.make_case(**shape, v_dim=24, dtype=torch.float32)]
    expected = sparse_attention_oracle(*(x.double() for x in args[:3]), *args[3:], 0.3, *strip[:2], 0)
    got = packed_attention(*args, 0.3, *strip[:2], inner=STUB)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_dense_attention_needs_as_many_queries_as_keys():
    args = cases.make_case(lengths=[40], k_len=40, q_len=10, dtype=torch.float32)
    with pytest.raises(ValueError, match="as many queries as keys, not 10 and 40"):
        packed_attention(*args, 0.3, 0, 0, inner=STUB)


@pytest.mark.parametrize(("limit", "together"), [(1 << 30, 12), (12 * 999, 6), (4 * 1000, 4), (1000, 1), (1, 1)])
def test_heads_that_run_together(limit, together, monkeypatch):
    """12 KV heads of one row of 100 tokens, 120 bytes a token over all heads."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", limit)
    assert chunks.kv_heads_per_chunk(torch.empty(1, 12, 100, 8), 120) == together
