"""Block-sparse attention among kept tokens: reference and Triton against the definition (docs/operators.md)."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tests.kernels.flat import (
    block_sparse_attention,
    block_sparse_attention_reference,
    order,
    select_blocks,
    select_blocks_reference,
)
from tsa_compile.export.common import ExportError
from tsa_compile.export.trace import trace
from tsa_compile.kernels.attend.blocks.reference import block_masses, kept_by_mass
from tsa_compile.kernels.attend.tokens.definition import sparse_attention_oracle
from tsa_compile.policies.base import from_dict
from tsa_compile.policies.inner_blocks import InnerBlocks

pytest.importorskip("triton")

_spec = importlib.util.spec_from_file_location("sparse_prefill_cases", Path(__file__).with_name("test_sparse_prefill.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ||out - ref|| / ||ref||: rounding of the output (and of p before the second product) in half types; tf32x3 in float32
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


def moved(args, dtype):
    return tuple(None if x is None else x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in args)


def random_blocks(args, block, seed=0, share=0.5):
    """Lists of key blocks for each query block, with its own, as `select_blocks` returns them."""
    q, k, counts = args[0], args[1], args[4]
    g = torch.Generator().manual_seed(seed)
    n = -(-k.shape[2] // block)
    wanted = torch.rand(*q.shape[:2], n, n, generator=g) < share
    row, column = torch.arange(n)[:, None], torch.arange(n)
    wanted = ((wanted | (row == column)) & (column <= row)) & (row * block < counts.cpu()[:, None, None, None])
    listed = torch.where(wanted, column, n).sort(-1).values
    return torch.where(listed < n, listed, -1).short().to(q.device), wanted.sum(-1).int().to(q.device)


def definition(args, scale, window, sinks, blocks, block_counts, block):
    """docs/operators.md in float64, one query at a time."""
    q, k, v, indices, counts, heavy, mask = (
        x if x is None else x.cpu().double() if x.is_floating_point() else x.cpu() for x in args
    )
    (batch, heads, q_len, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        real = torch.arange(k_len) if mask is None else mask[b].nonzero().squeeze(1)
        rank = {int(p): r for r, p in enumerate(real)}
        for h in range(heads):
            group = h * indices.shape[1] // heads
            kept = indices[b, group, : int(counts[b])].tolist()
            slot = {p: s for s, p in enumerate(kept)}
            strip = {int(p) for p in heavy[b, group] if p >= 0} | {int(p) for p in real[:sinks]}
            for i in real[real >= k_len - q_len].tolist():
                read = {p for p in strip if p <= i}
                read |= {int(p) for p in real[max(rank[i] - window + 1, 0) : rank[i] + 1]} if window else set()
                if i in slot:
                    own = slot[i] // block
                    chosen = set(blocks[b, h, own, : int(block_counts[b, h, own])].tolist())
                    read = (read - set(kept)) | {p for p in kept if p <= i and slot[p] // block in chosen}
                at = sorted(read)
                if at:
                    kv = h * kv_heads // heads
                    out[b, h, i - (k_len - q_len)] = (
                        torch.softmax(scale * q[b, h, i - (k_len - q_len)] @ k[b, kv, at].T, 0) @ v[b, kv, at]
                    )
    return out


SHAPES = {
    "plain": dict(lengths=[140], k_len=140, q_len=140),
    "padding": dict(lengths=[130, 1, 77], k_len=130, q_len=130, padding="holes"),
    "empty row": dict(lengths=[60, 0], k_len=60, q_len=60),
    "nothing kept": dict(lengths=[50], k_len=50, q_len=50, keep=0),
    "everything kept": dict(lengths=[70, 50], k_len=70, q_len=70, keep=1),
    "chunked": dict(lengths=[150, 90], k_len=150, q_len=40),
    "one list per KV head": dict(lengths=[120], k_len=120, q_len=120, heads=6, per_query_head=False),
    "MQA, head dims": dict(lengths=[100], k_len=100, q_len=100, heads=3, kv_heads=1, dim=24, v_dim=40),
}
STRIPS = [(0, 0, 0), (16, 4, 8)]


@pytest.mark.parametrize("strip", STRIPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_the_definition(shape, strip):
    args = cases.make_case(**SHAPES[shape], heavy=strip[2])
    blocks = random_blocks(args, 16)
    got = block_sparse_attention_reference(*args[:6], *blocks, args[6], 0.3, *strip[:2], 16)
    torch.testing.assert_close(got, definition(args, 0.3, *strip[:2], *blocks, 16), rtol=0, atol=1e-12)
    assert got.transpose(1, 2).is_contiguous()


def triton_error(args, blocks, strip, block, dtype):
    args = moved(args, dtype)
    blocks = tuple(x.to(DEVICE) for x in blocks)
    reference = (*(x.double() for x in args[:3]), *args[3:6])
    expected = block_sparse_attention_reference(*reference, *blocks, args[6], 0.3, *strip, block)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        got = block_sparse_attention(*args[:6], *blocks, args[6], 0.3, *strip, block, "fused")
    finally:
        torch.use_deterministic_algorithms(False)
    assert got.transpose(1, 2).is_contiguous()
    assert (got[expected.abs().amax(-1) == 0] == 0).all()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("strip", STRIPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton(shape, strip):
    args = cases.make_case(**SHAPES[shape], heavy=strip[2])
    assert triton_error(args, random_blocks(args, 32), strip[:2], 32, torch.float32) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "block", "dim"),
    [
        (torch.float16, 64, 128),
        (torch.bfloat16, 128, 64),
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 64, 256),
        (torch.float32, 16, 64),
        (torch.float32, 128, 256),
    ],
    ids=str,
)
def test_triton_dtypes(dtype, block, dim):
    args = cases.make_case(lengths=[1500, 700], k_len=1500, q_len=1500, heads=8, dim=dim, heavy=16, padding="left")
    for strip in ((0, 0), (100, 4)):
        given = args if strip[0] else (*args[:5], args[5][..., :0], args[6])
        assert triton_error(given, random_blocks(given, block), strip, block, dtype) < TOLERANCE[dtype]


def attention_like(q_len, k_len, batch=2, heads=4, kv_heads=2, dim=16, seed=0):
    """Queries that look for some stretches of keys."""
    g = torch.Generator().manual_seed(seed)
    k = (
        torch.randn(batch, kv_heads, k_len, dim, generator=g)
        + torch.randn(batch, kv_heads, -(-k_len // 24), dim, generator=g).repeat_interleave(24, 2)[:, :, :k_len]
    )
    return torch.randn(batch, heads, q_len, dim, generator=g) + torch.randn(batch, heads, 1, dim, generator=g), k


def check_choice(q, k, indices, counts, arguments, got):
    """Lists are ascending; every block is kept that must be, and no other, but for rounding at the threshold."""
    scale, block, pool, mass, sinks, local, dense_below = arguments
    blocks, block_counts = (x.cpu().long() for x in got)
    offset = k.shape[2] - q.shape[2]
    for b, n in enumerate(counts.tolist()):
        masses = (
            block_masses(q[b].double().cpu(), k[b].double().cpu(), indices[b, :, :n].long().cpu(), scale, block, pool)
            if n
            else None
        )
        for h in range(q.shape[1]):
            kept = indices[b, h * indices.shape[1] // q.shape[1], :n].cpu()
            for row in range(blocks.shape[2]):
                number, listed = int(block_counts[b, h, row]), blocks[b, h, row]
                assert (listed[number:] == -1).all()
                if row * block >= n or kept[min((row + 1) * block, n) - 1] < offset:
                    assert number == 0
                    continue
                chosen = set(listed[:number].tolist())
                assert sorted(chosen) == listed[:number].tolist()
                always = {j for j in range(row + 1) if j < sinks or j > row - local or n <= dense_below or mass == 1}
                assert always <= chosen <= set(range(row + 1))
                line = masses[h, row]
                for j in set(range(row + 1)) - always:
                    heavier = line[line > line[j]].sum() / line.sum()
                    if abs(heavier - mass) > 1e-3:
                        assert (j in chosen) == bool(heavier < mass), (b, h, row, j)


@settings(max_examples=8, deadline=None)
@given(
    k_len=st.integers(1, 200),
    q_share=st.floats(0.01, 1),
    keep=st.floats(0, 1),
    block=st.sampled_from([16, 32]),
    parts=st.sampled_from([1, 4, 16]),
    mass=st.sampled_from([0.3, 0.8, 1.0]),
    grouped=st.booleans(),
    seed=st.integers(0, 100),
)
def test_choice_of_blocks(k_len, q_share, keep, block, parts, mass, grouped, seed):
    q, k = attention_like(max(1, int(k_len * q_share)), k_len, seed=seed)
    case = cases.make_case([k_len, max(1, k_len // 2)], k_len, k_len, keep=keep, per_query_head=not grouped, seed=seed)
    indices, counts = case[3].to(DEVICE), case[4].to(DEVICE)
    arguments = (0.25, block, block // parts, mass, 1, 2, 20)
    q, k = q.to(DEVICE), k.to(DEVICE)
    reference = select_blocks_reference(q.double(), k.double(), indices, counts, *arguments)
    check_choice(q, k, indices, counts, arguments, reference)
    check_choice(q, k, indices, counts, arguments, select_blocks(q, k, indices, counts, *arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_choice_in_half_precision_on_a_long_row(dtype):
    q, k = attention_like(40_000, 40_000, 1, 2, 1, 64)
    case = cases.make_case([40_000], 40_000, 1, heads=2, kv_heads=1)
    indices, counts = case[3].cuda(), case[4].cuda()
    q, k = q.to("cuda", dtype), k.to("cuda", dtype)
    got = select_blocks(q, k, indices, counts, 0.125, 128, 16, 0.9, 1, 3, 1000)
    want = select_blocks_reference(q, k, indices, counts, 0.125, 128, 16, 0.9, 1, 3, 1000)
    assert ((got[1] - want[1]).abs() <= 2).all()  # means are rounded to the dtype
    assert (got[1] < torch.arange(1, got[1].shape[-1] + 1, device="cuda")).float().mean() > 0.3


def test_mass_one_is_sparse_attention():
    args = cases.make_case(**SHAPES["padding"], heavy=8)
    blocks = select_blocks_reference(*args[:2], *args[3:5], 0.3, 16, 4, 1.0, 0, 1, 0)
    got = block_sparse_attention_reference(*args[:6], *blocks, args[6], 0.3, 16, 4, 16)
    torch.testing.assert_close(got, sparse_attention_oracle(*args, 0.3, 16, 4, 0), rtol=0, atol=1e-12)


def test_kept_by_mass():
    masses = torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1], [0.0, 0.0, 1.0, 0.0, 0.0]])
    assert kept_by_mass(masses, 0.7).tolist() == [[False, True, False, True, False], [False, False, True, False, False]]
    assert kept_by_mass(masses, 0.71).tolist()[0] == [True] * 5  # equals share a fate


def test_opcheck():
    args = cases.make_case(**SHAPES["padding"], heavy=8, dtype=torch.float32)
    choose = (*args[:2], *args[3:5], 0.3, 16, 4, 0.8, 1, 2, 20)
    torch.library.opcheck(torch.ops.tsa.select_blocks.default, choose)
    blocks = torch.ops.tsa.select_blocks(*choose)
    attend = (*args[:6], *blocks, *order(args[6]), 0.3, 16, 4, 16, "auto")
    torch.library.opcheck(torch.ops.tsa.block_sparse_attention.default, (*attend, True))
    torch.library.opcheck(torch.ops.tsa.block_sparse_attention.default, attend)


INNER = InnerBlocks(mass=0.5, block=16, pool=4, local=1)
POLICY = tsa.TokenSparse(coverage=0.05, window=8, pool=3, min_tokens=8, completion=tsa.Completion(4, 2, 4), inner=INNER)


def test_a_transformed_model_runs_both_sparsities():
    model, ids = tiny_llama(), token_ids(200, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    logits = {}
    for name, inner in (("none", None), ("all", dataclasses.replace(INNER, mass=1.0)), ("half", INNER)):
        tsa.transform(model, dataclasses.replace(POLICY, inner=inner), fullgraph=True)
        with torch.no_grad():
            logits[name] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        tsa.restore(model)
    torch.testing.assert_close(logits["all"], logits["none"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits["half"], logits["none"], atol=1e-3)


def test_policies_and_plans_carry_it():
    assert from_dict(POLICY.to_dict()) == POLICY
    assert tsa.Plan.from_dict(tsa.Plan(POLICY).to_dict()) == tsa.Plan(POLICY)


def test_exports_refuse_it_by_name():
    with pytest.raises(ExportError, match=r"TokenSparse\.inner is an InnerBlocks"):
        trace(tiny_llama(), (token_ids(60),), {"use_cache": False}, policy=POLICY)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InnerBlocks(mass=0), r"InnerBlocks\.mass must be a number in \(0, 1\], got 0"),
        (lambda: InnerBlocks(block=48), r"InnerBlocks\.block must be one of .* got 48"),
        (lambda: InnerBlocks(pool=4), r"InnerBlocks\.pool must divide block \(128\) into at most 16 parts, got 4"),
        (lambda: InnerBlocks(pool=0), r"InnerBlocks\.pool must be an int >= 1 and <= 128, got 0"),
        (lambda: InnerBlocks(local=0), r"InnerBlocks\.local must be an int >= 1, got 0"),
        (lambda: tsa.TokenSparse(inner=0.9), r"TokenSparse\.inner must be an InnerBlocks or None, got 0\.9"),
        (lambda: tsa.TokenSparse(inner=INNER, engine="packed"), "TokenSparse.engine 'packed' .* with inner use 'auto'"),
    ],
)
def test_a_bad_value_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.gpu
def test_no_synchronisation_and_graph_replay():
    args = moved(cases.make_case(lengths=[1500, 700], k_len=1500, q_len=1500, heads=8, dim=64, heavy=16), torch.bfloat16)

    def run():
        blocks = select_blocks(*args[:2], *args[3:5], 0.125, 64, 8, 0.8, 1, 2, 100)
        return block_sparse_attention(*args[:6], *blocks, args[6], 0.125, 64, 4, 64)

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
