"""The log-sum-exp that attention returns beside its result: of every form, against float64; -inf where nothing was read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.kernels import flat
from tests.kernels.test_packed import STUB
from tsa_compile.kernels.attend.tokens.definition import allowed_keys, members

_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("test_sparse_prefill.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "plain": dict(lengths=[150], k_len=150, q_len=150),
    "padding": dict(lengths=[90, 0, 41], k_len=90, q_len=90, padding="holes"),
    "a chunk": dict(lengths=[150, 100], k_len=150, q_len=37),
    "nothing kept": dict(lengths=[50], k_len=50, q_len=50, keep=0),
    "everything kept": dict(lengths=[50, 50], k_len=50, q_len=50, keep=1),
    "shared lists": dict(lengths=[90], k_len=90, q_len=90, per_query_head=False),
}
FORMS = {
    "reference": flat.with_lse(flat.sparse_attention_reference),
    "fused": lambda *args: flat.with_lse(flat.sparse_attention)(*args, "fused"),
    "packed": lambda *args: flat.with_lse(flat.packed_attention)(*args[:-1], inner=STUB),
}


def expected(args, scale, window, sinks):
    """float64 log-sum-exp of what docs/operators.md lets each row read."""
    q, k, _, indices, counts, heavy, mask = args
    (heads, q_len), (kv_heads, k_len) = q.shape[1:3], k.shape[1:3]
    lse = []
    for b in range(q.shape[0]):
        real = torch.ones(k_len, dtype=torch.bool) if mask is None else mask[b]
        kept, heaviest = (members(x, k_len, heads) for x in (indices[b, :, : int(counts[b])], heavy[b]))
        allowed = allowed_keys(torch.arange(k_len - q_len, k_len), real, kept, heaviest, window, sinks)
        scores = q[b].double() @ k[b].double().repeat_interleave(heads // kv_heads, 0).mT * scale
        lse.append(scores.masked_fill(~allowed, -torch.inf).logsumexp(-1))
    return torch.stack(lse)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strip", [(0, 0, 0), (16, 4, 8)], ids=["paper", "strip"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(form, strip, shape):
    pytest.importorskip("triton")
    if form == "packed" and shape == "a chunk":
        pytest.skip("dense engines take as many queries as keys")
    args = cases.make_case(**SHAPES[shape], heavy=strip[2], dtype=torch.float32)
    moved = [None if x is None else x.to(DEVICE) for x in args]
    out, lse = FORMS[form](*moved, 0.3, *strip[:2], 0)
    torch.testing.assert_close(lse.cpu().double(), expected(args, 0.3, *strip[:2]), rtol=1e-5, atol=1e-5)
    assert (out.cpu()[lse.cpu() == -torch.inf] == 0).all()
    without = {"reference": flat.sparse_attention_reference, "fused": flat.sparse_attention}.get(form)
    if without is not None:
        torch.testing.assert_close(without(*moved, 0.3, *strip[:2], 0, "reference" if form == "reference" else "fused"), out)


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_of_key_attention(form):
    pytest.importorskip("triton")
    attend = flat.with_lse(flat.key_attention if form == "triton" else flat.key_attention_reference)
    q, k = torch.randn(2, 4, 33, 16, device=DEVICE), torch.randn(2, 2, 50, 16, device=DEVICE)
    indices, counts = torch.arange(50, dtype=torch.int32, device=DEVICE).expand(2, 4, -1), torch.tensor([37, 0]).int().to(DEVICE)
    out, lse = attend(q, k, k, indices, counts, 0.3)
    want = (q[0].double() @ k[0, :, :37].double().repeat_interleave(2, 0).mT * 0.3).logsumexp(-1)
    torch.testing.assert_close(lse[0].double(), want, rtol=1e-5, atol=1e-5)
    assert (lse[1] == -torch.inf).all()
    assert (out[1] == 0).all()


def test_nobody_pays_who_does_not_ask():
    args = cases.make_case(**SHAPES["plain"], dtype=torch.float32)
    out, lse = torch.ops.tsa.sparse_attention(*args[:6], None, None, 0.3, 0, 0, 0, "auto")
    assert lse.shape == (0,)
    both = torch.ops.tsa.sparse_attention(*args[:6], None, None, 0.3, 0, 0, 0, "auto", need_lse=True)
    assert torch.equal(both[0], out)
    assert both[1].shape == out.shape[:3]
