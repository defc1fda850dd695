"""Key blocks among kept tokens (`tsa::token_block_attention`): the definition, Triton against the reference, the policy."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tests.kernels import flat
from tsa_compile.export.common import ExportError
from tsa_compile.export.trace import trace
from tsa_compile.kernels.select.threshold_pages.reference import select_key_blocks_reference, unpack_bits
from tsa_compile.policies.base import from_dict
from tsa_compile.session import attached

_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("test_sparse_prefill.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}  # as for the prefill by key blocks
RULE = (0.4, 32, 40, 3, 20, "head")  # alpha, pool, window, sinks, last_dense, share
DENSE = (0.0, *RULE[1:])
SHAPES = {
    "plain": dict(lengths=[310], k_len=310, q_len=310, heads=2, kv_heads=1, keep=0.9),
    "padding": dict(lengths=[290, 1, 140], k_len=290, q_len=290, heads=2, keep=0.9, padding="holes"),
    "empty row": dict(lengths=[60, 0], k_len=60, q_len=60),
    "nothing kept": dict(lengths=[50], k_len=50, q_len=50, keep=0),
    "a chunk": dict(lengths=[300, 200], k_len=300, q_len=140, heads=2, keep=0.9),
    "one list per KV head": dict(lengths=[200], k_len=200, q_len=200, heads=3, kv_heads=1, keep=0.8, per_query_head=False),
    "MQA, head dims": dict(lengths=[150], k_len=150, q_len=150, heads=3, kv_heads=1, dim=24, v_dim=40),
}
STRIPS = [(0, 0, 0), (16, 4, 8)]


def definition(args, scale, window, sinks, rule, rows):
    """docs/operators.md in float64, one query at a time, for some rows; without padding."""
    q, k, v, indices, counts, heavy, mask = args
    assert mask is None
    (batch, heads, q_len, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        n = int(counts[b])
        for h in range(heads):
            group, kv = h * indices.shape[1] // heads, h * kv_heads // heads
            kept = indices[b, group, :n].tolist()
            has_query = [p >= k_len - q_len for p in kept]
            asked = [q[b, h, max(0, p - (k_len - q_len))] * there for p, there in zip(kept, has_query, strict=True)]
            queries, keys = torch.stack(asked)[None, None], k[b, kv, kept][None, None]
            means = torch.stack([keys[0, 0, i : i + 64].mean(0) for i in range(0, n, 64)])[None, None]
            numbers = torch.tensor([[min(64, n - i) for i in range(0, n, 64)]], dtype=torch.int32)
            bits = select_key_blocks_reference(queries, means, numbers, None, None, None, n, scale, [rule[0]], *rule[1:])
            chosen = unpack_bits(bits, -(-n // 64))[0, 0]
            slot = {p: s for s, p in enumerate(kept)}
            for p in (k_len - q_len + r for r in rows):
                read = {s for s in range(sinks) if s <= p} | {int(x) for x in heavy[b, group] if 0 <= x <= p}
                read |= set(range(max(0, p - window + 1), p + 1)) if window else set()
                if p in slot:
                    own = slot[p] // 128
                    blocks = set(chosen[own].nonzero().flatten().tolist()) | {2 * own, 2 * own + 1}
                    read = (read - set(kept)) | {x for x in kept if x <= p and slot[x] // 64 in blocks}
                at = sorted(read)
                if at:
                    row = q[b, h, p - (k_len - q_len)]
                    out[b, h, p - (k_len - q_len)] = torch.softmax(scale * row @ k[b, kv, at].T, 0) @ v[b, kv, at]
    return out


@pytest.mark.parametrize("strip", STRIPS, ids=str)
@pytest.mark.parametrize("shape", [dict(lengths=[400], k_len=400, q_len=400), dict(lengths=[430], k_len=430, q_len=150)], ids=str)
def test_reference_equals_the_definition(shape, strip):
    args = cases.make_case(**shape, heads=2, kv_heads=1, keep=0.9, heavy=strip[2])
    got = flat.token_block_attention_reference(*args, 0.3, *strip[:2], RULE)
    rows = range(0, shape["q_len"], 9)
    want = definition(args, 0.3, *strip[:2], RULE, rows)[:, :, rows]
    torch.testing.assert_close(got[:, :, rows], want, rtol=0, atol=1e-6)  # a log-sum-exp is float32
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_all_blocks_are_all_kept_tokens(shape):
    args = cases.make_case(**SHAPES[shape], heavy=8)
    got = flat.with_lse(flat.token_block_attention_reference)(*args, 0.3, 16, 4, DENSE)
    want = flat.with_lse(flat.sparse_attention_reference)(*args, 0.3, 16, 4, 0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # a log-sum-exp is float32


def triton_error(args, strip, rule, dtype):
    args = tuple(None if x is None else x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in args)
    exact = (*(x.double() for x in args[:3]), *args[3:])
    expected = flat.with_lse(flat.token_block_attention_reference)(*exact, 0.3, *strip, rule)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        out, lse = flat.with_lse(flat.token_block_attention)(*args, 0.3, *strip, rule, "fused")
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(lse == -torch.inf, expected.lse == -torch.inf)
    there = lse > -torch.inf
    torch.testing.assert_close(lse[there], expected.lse[there], rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-2)
    assert (out[~there] == 0).all()
    return float((out.double() - expected.out).norm() / expected.out.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("shape", "strip"), [(s, STRIPS[i % 2]) for i, s in enumerate(SHAPES)], ids=str)
def test_triton(shape, strip):
    pytest.importorskip("triton")
    args = cases.make_case(**SHAPES[shape], heavy=strip[2])
    assert triton_error(args, strip[:2], DENSE, torch.float32) < TOLERANCE[torch.float32]


def test_triton_chooses_as_the_reference_does():
    pytest.importorskip("triton")
    args = cases.make_case(lengths=[420, 300], k_len=420, q_len=420, heads=2, keep=0.95, padding="left", heavy=8)
    assert triton_error(args, (16, 4), RULE, torch.float32) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_triton_dtypes(dtype, dim):
    shape = dict(lengths=[1500, 700], k_len=1500, q_len=1500, heads=8, dim=dim, heavy=16)
    for padding in ("left", "right"):
        assert triton_error(cases.make_case(**shape, padding=padding), (100, 4), DENSE, dtype) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_no_synchronisation_and_graph_replay():
    args = cases.make_case(lengths=[1500, 700], k_len=1500, q_len=1500, heads=8, dim=64, heavy=16)
    args = [None if x is None else x.cuda().bfloat16() if x.is_floating_point() else x.cuda() for x in args]
    call = (*args[:6], *flat.order(args[6]), 0.125, 64, 4, *RULE, "auto")
    run = lambda: torch.ops.tsa.token_block_attention(*call)[0]  # noqa: E731
    want = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    got.fill_(-7)
    graph.replay()
    assert torch.equal(got, want)


def test_the_last_rows_read_every_kept_token():
    """With `last_dense` as wide as the tokens that every selection keeps, they get what they get without blocks."""
    args = cases.make_case(lengths=[400], k_len=400, q_len=400, heads=2, kv_heads=1, keep=1)
    got = flat.token_block_attention_reference(*args, 0.3, 0, 0, (0.99, 128, 1, 0, 40, "head"))
    want = flat.sparse_attention_reference(*args, 0.3, 0, 0, 0)
    torch.testing.assert_close(got[:, :, -40:], want[:, :, -40:], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(got[:, :, 128:256], want[:, :, 128:256], atol=1e-5)


def test_opcheck():
    args = cases.make_case(lengths=[90, 41], k_len=90, q_len=90, heavy=8, padding="holes", dtype=torch.float32)
    call = (*args[:6], *flat.order(args[6]), 0.3, 16, 4, *RULE, "auto")
    torch.library.opcheck(torch.ops.tsa.token_block_attention.default, call)
    torch.library.opcheck(torch.ops.tsa.token_block_attention.default, (*call, True))


INNER = tsa.BlockSparse(alpha=0.999, window=1, sinks=0, last_dense=0)
POLICY = tsa.TokenSparse(coverage=0.05, window=8, pool=3, min_tokens=8, completion=tsa.Completion(4, 2, 4), inner=INNER)


def test_a_transformed_model_runs_both_sparsities():
    model, ids = tiny_llama(), token_ids(400, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    logits = {}
    session = attached(tsa.transform(model, POLICY, fullgraph=True))
    for name, inner in (("none", None), ("all", dataclasses.replace(INNER, alpha=0.0)), ("some", INNER)):
        session.plan = tsa.Plan(dataclasses.replace(POLICY, inner=inner))
        with torch.no_grad():
            logits[name] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(logits["all"], logits["none"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits["some"], logits["none"], atol=1e-5)


def test_policies_and_plans_carry_it():
    assert from_dict(POLICY.to_dict()) == POLICY
    assert tsa.Plan.from_dict(tsa.Plan(POLICY).to_dict()) == tsa.Plan(POLICY)


def test_exports_refuse_it_by_name():
    with pytest.raises(ExportError, match=r"TokenSparse\.inner is a BlockSparse"):
        trace(tiny_llama(), (token_ids(60),), {"use_cache": False}, policy=POLICY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(inner=0.9), r"TokenSparse\.inner must be a BlockSparse or None, got 0\.9"),
        (dict(inner=tsa.BlockSparse((0.1, 0.2))), r"TokenSparse\.inner takes one alpha for all heads, got \(0\.1, 0\.2\)"),
        (dict(inner=INNER, engine="packed"), "TokenSparse.engine 'packed' .* with inner use 'auto'"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tsa.TokenSparse(**fields)
