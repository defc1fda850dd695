"""Prefill by key blocks over pages that lie anywhere (`KvView.blocks`): as over keys in order, and nothing else is read."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.page_cases import SHAPES, dense_attention, make_case, moved, visible_keys
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.attend.pages.reference import key_block_attention_reference
from tsa_compile.kernels.common.view import length_of, rows_in_order
from tsa_compile.kernels.score.page_mass.reference import key_block_means_reference
from tsa_compile.kernels.types import KvView

tsa = torch.ops.tsa
VIEWED = ("plain", "chunk", "one row", "both, a chunk", "holes")
RULE = ([0.3], 32, 70, 3, 40)


def scattered(case, block, per_entry=1, seed=0, rest=torch.nan):
    """(k, v, table): the case's keys and values in blocks of a pool, of which the others and the rest of the last hold `rest`."""
    g = torch.Generator().manual_seed(seed)
    (batch, kv_heads, k_len, _), used = case.k.shape, -(-case.k.shape[2] // block)
    entries = -(-(batch * used + 3) // per_entry)
    order = torch.randperm(entries * per_entry, generator=g)[: batch * used].view(batch, used)
    pools = []
    for x in (case.k, case.v):
        pool = torch.full((entries, kv_heads, per_entry * block, x.shape[3]), rest, dtype=x.dtype, device=x.device)
        slots = pool.transpose(1, 2).reshape(-1, block, kv_heads, x.shape[3])  # a copy: slots by number
        filled = torch.nn.functional.pad(x, (0, 0, 0, used * block - k_len), value=rest)
        slots[order.to(x.device)] = filled.unflatten(2, (used, block)).permute(0, 2, 3, 1, 4)
        pools.append(slots.reshape(entries, per_entry * block, kv_heads, x.shape[3]).transpose(1, 2))
    table = torch.full((batch, used + 2), 1 << 30, dtype=torch.int32)  # behind the row's blocks it may say anything
    table[:, :used] = order
    return *pools, table.to(case.k.device)


def both(case, block, per_entry=1, rest=torch.nan):
    """Bits and results over pages, and over the keys in order, by whatever runs where the tensors are."""
    k, v, table = scattered(case, block, per_entry, rest=rest)
    k_len, padding = case.k.shape[2], case.padding
    where = dict(blocks=table, block=block, k_len=k_len)
    means = tsa.key_block_means(k, *padding, **where)
    bits = tsa.select_key_blocks(case.q, k, *means, *padding, case.scale, *RULE, k_len=k_len)
    out = tsa.key_block_attention(case.q, k, v, bits, table, block, *padding, case.scale, True, k_len=k_len)
    in_order = tsa.key_block_means(case.k, *padding)
    want_bits = tsa.select_key_blocks(case.q, case.k, *in_order, *padding, case.scale, *RULE)
    want = tsa.key_block_attention(case.q, case.k, case.v, want_bits, None, 1, *padding, case.scale, True)
    return (*means, bits, *out), (*in_order, want_bits, *want)


@pytest.mark.parametrize("shape", VIEWED)
@pytest.mark.parametrize(("block", "per_entry"), [(16, 1), (128, 1), (1, 1), (48, 3)])
def test_references_over_pages_equal_those_in_order(shape, block, per_entry):
    for got, want in zip(*both(make_case(**SHAPES[shape]), block, per_entry), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", VIEWED)
def test_the_reference_over_pages_is_attention(shape):
    case = make_case(**SHAPES[shape])
    k, v, table = scattered(case, 32)
    means = key_block_means_reference(k, *case.padding, blocks=table, block=32, k_len=case.k.shape[2])
    bits = tsa.select_key_blocks(case.q, case.k, *means, *case.padding, case.scale, *RULE)
    where = (table, 32, *case.padding, case.scale, True)
    out, lse = key_block_attention_reference(case.q, k, v, bits, *where, k_len=case.k.shape[2])
    want, want_lse = dense_attention(case, visible_keys(case, bits))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("padding", "block", "per_entry"), [(None, 16, 1), ("both", 64, 1), ("holes", 48, 3)])
def test_kernels_over_pages_equal_those_in_order(padding, block, per_entry):
    pytest.importorskip("triton")
    from tsa_compile.kernels.attend.pages import host as attend
    from tsa_compile.kernels.score.page_mass import host as page_mass

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = 2 if padding == "both" else 1
    case = moved(make_case(50, 300, batch, heads=1, kv_heads=1, padding=padding), torch.float32, device)
    k, v, table = scattered(case, block, per_entry)
    where = dict(blocks=table, block=block, k_len=case.k.shape[2])
    means = page_mass.key_block_means(k, *case.padding, **where)
    in_order = page_mass.key_block_means(case.k, *case.padding)
    bits = tsa.select_key_blocks(case.q, case.k, *in_order, *case.padding, case.scale, *RULE)
    padding, k_len = (*case.padding, case.scale, True), case.k.shape[2]
    got = attend.key_block_attention(case.q, k, v, bits, table, block, *padding, k_len=k_len)
    want = key_block_attention_reference(case.q, case.k, case.v, bits, None, 1, *padding)
    for a, b in zip(means, in_order, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(got[0]).all()


def test_fewer_positions_than_there_is_room_for():
    """The first 300 rows of a cache of 400: what lies behind them is not read."""
    case = make_case(q_len=100, k_len=300)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 100), value=torch.nan) for x in (case.k, case.v))
    means = tsa.key_block_means(k, None, None, None, k_len=300)
    bits = tsa.select_key_blocks(case.q, k, *means, None, None, None, case.scale, *RULE, k_len=300)
    got = tsa.key_block_attention(case.q, k, v, bits, None, 1, None, None, None, case.scale, False, k_len=300)[0]
    want = tsa.key_block_attention(case.q, case.k, case.v, bits, None, 1, None, None, None, case.scale, False)[0]
    assert torch.equal(got, want)


def test_opcheck_over_pages():
    case = make_case(q_len=150, k_len=333, dtype=torch.float32)
    k, v, table = scattered(case, 16)
    where = dict(blocks=table, block=16, k_len=333)
    torch.library.opcheck(tsa.key_block_means.default, (k.nan_to_num(), None, None, None), where)
    means = tsa.key_block_means(k, None, None, None, **where)
    choose = (case.q, k.nan_to_num(), *means, None, None, None, case.scale, *RULE)
    torch.library.opcheck(tsa.select_key_blocks.default, choose, {"k_len": 333})
    bits = tsa.select_key_blocks(*choose, k_len=333)
    attend = (case.q, k.nan_to_num(), v.nan_to_num(), bits, table, 16, None, None, None, case.scale, True)
    torch.library.opcheck(tsa.key_block_attention.default, attend, {"k_len": 333})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k_len=400), "k_len must be from 0 to 352, for which there is room, got 400"),
        (dict(k_len=100), "150 queries for 100 keys"),
        (dict(block=5), "block must divide the 16 rows of k, got 5"),
        (dict(blocks=torch.zeros(2, 22, dtype=torch.int32)), r"blocks must be int32 \[1, P\]"),
        (dict(blocks=torch.zeros(1, 22)), r"blocks must be int32 \[1, P\]"),
    ],
)
def test_a_bad_view_is_named(changes, message):
    case = make_case(q_len=150, k_len=333, dtype=torch.float32)
    k, v, table = scattered(case, 16)
    rest = {"blocks": table[:, :22], "block": 16, "k_len": 333, **changes}
    bits = torch.zeros(1, 4, 3, 1).long()
    padding = dict(start=None, lengths=None, key_mask=None)
    with pytest.raises(ValueError, match=message):
        tsa.key_block_attention(case.q, k, v, bits, scale=1.0, need_lse=False, **padding, **rest)


def test_length_of_a_view():
    k = torch.zeros(6, 1, 32, 4)
    view = KvView(torch.zeros(2, 5, dtype=torch.int32), 16, None, None)
    assert (length_of(k, view, None), length_of(k, view, 70), rows_in_order(k, view).shape[2]) == (80, 70, 80)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [16, 64, 256, 528])
@pytest.mark.parametrize("dim", [128, 256])
def test_long_prompts_over_pages(dtype, block, dim):
    case = moved(make_case(2100, 9000, 1, 8, 2, dim), dtype, "cuda")
    got, want = both(
        case, block, rest=torch.nan if block % 64 else 100.0
    )  # Hopper's own kernel multiplies what it does not read by 0
    assert torch.equal(got[2], want[2])
    torch.testing.assert_close(got[3].float(), want[3].float(), rtol=0, atol=2e-2)
