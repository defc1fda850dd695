"""The references of block-sparse prefill against their definitions (docs/operators.md), one row at a time in float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.page_cases import SHAPES, dense_attention, make_case, visible_keys
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.attend.pages.reference import key_block_attention_reference
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, own_keys, row_block_count, valid_range, word_count
from tsa_compile.kernels.score.page_mass.reference import key_block_means_reference
from tsa_compile.kernels.select.threshold_pages.reference import pack_bits, select_key_blocks_reference, unpack_bits

RULE = dict(alpha=[0.3], pool=32, window=70, sinks=3, last_dense=40)


def select(case, **changes):
    means = key_block_means_reference(case.k, *case.padding)
    return select_key_blocks_reference(case.q, *means, *case.padding, case.k.shape[2], case.scale, **{**RULE, **changes})


def expected_bits(case, alpha, pool, window, sinks, last_dense):
    """The rule in words: for each row block, each score row's softmax over mean keys, in Python loops."""
    (batch, heads, q_len, _), (kv_heads, k_len) = case.q.shape, case.k.shape[1:3]
    first, end = valid_range(batch, k_len, case.start, case.lengths, case.q.device)
    begin, own = own_keys(q_len, k_len, end)
    blocks = -(-k_len // KEYS)
    kept = torch.zeros(batch, heads, len(begin), blocks, dtype=torch.bool)
    for b in range(batch):
        low, high = int(first[b]), int(end[b])
        real = [p for p in range(low, high) if case.key_mask is None or case.key_mask[b, p]]
        keys = {c: [p for p in real if p // KEYS == c] for c in range(blocks)}
        keys = {c: positions for c, positions in keys.items() if positions}
        for r, p0 in enumerate(begin.tolist()):
            own_at = int(own[b, r])
            rows = [p for p in real if p0 <= p < p0 + ROWS and p >= k_len - q_len]
            for h in range(heads):
                kv = h * kv_heads // heads
                scored = [c for c in keys if (c + 1) * KEYS <= own_at]
                mass = torch.zeros(blocks, dtype=torch.float64)
                for group in range(p0, p0 + ROWS, pool):
                    mine = [p for p in rows if group <= p < group + pool]
                    if mine and scored:
                        query = case.q[b, h, [p - (k_len - q_len) for p in mine]].mean(0)
                        logits = torch.stack([query @ case.k[b, kv, keys[c]].mean(0) * case.scale for c in scored])
                        mass[scored] += logits.softmax(0) * len(mine) / len(rows)
                dense = p0 < high and p0 + ROWS > high - last_dense and last_dense > 0
                must = {
                    c for c in keys
                    if c * KEYS < own_at + ROWS
                    and (dense or c * KEYS >= own_at or (c + 1) * KEYS > own_at - window + 1 or c * KEYS < low + sinks)
                }  # fmt: skip
                free = [c for c in scored if c not in must]
                top = max((float(mass[c]) for c in free), default=0.0)
                for c in must | {c for c in free if mass[c] >= alpha * top > 0}:
                    kept[b, h, r, c] = True
    return kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool", [16, 128])
def test_selection_equals_the_rule(shape, pool):
    case = make_case(**SHAPES[shape])
    got = unpack_bits(select(case, pool=pool), -(-case.k.shape[2] // KEYS))
    assert torch.equal(got, expected_bits(case, 0.3, pool, *(RULE[x] for x in ("window", "sinks", "last_dense"))))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_definition(shape):
    case = make_case(**SHAPES[shape])
    bits = select(case)
    out, lse = key_block_attention_reference(case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, True)
    want, want_lse = dense_attention(case, visible_keys(case, bits))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_zero_is_dense(shape):
    case = make_case(**SHAPES[shape])
    bits = select(case, alpha=[0.0], last_dense=0)
    out, _ = key_block_attention_reference(case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, False)
    everything = torch.full_like(bits, -1)
    torch.testing.assert_close(out, dense_attention(case, visible_keys(case, everything))[0], rtol=0, atol=1e-12)


def test_one_list_for_a_kv_head_is_the_union():
    case = make_case(heads=6, kv_heads=2, q_len=300, k_len=700)
    assert torch.equal(unpack_bits(select(case, share="group"), 11), unpack_bits(select(case), 11).unflatten(1, (2, 3)).any(2))


def test_alpha_by_head():
    case = make_case(heads=2, kv_heads=1, q_len=700, k_len=700)
    both = select(case, alpha=[0.9, 0.05])
    assert torch.equal(both[:, :1], select(case, alpha=[0.9])[:, :1])
    assert torch.equal(both[:, 1:], select(case, alpha=[0.05])[:, 1:])


def test_chunks_of_whole_row_blocks_choose_as_one_piece():
    whole = make_case(q_len=1024, k_len=1024)
    means = key_block_means_reference(whole.k[:, :, :512], None, None, None)
    rule = {**RULE, "last_dense": 0}
    part = select_key_blocks_reference(whole.q[:, :, 256:512], *means, None, None, None, 512, whole.scale, **rule)
    assert torch.equal(part, select(whole, last_dense=0)[:, :, 2:4])


def test_bits_round_trip():
    kept = torch.rand(2, 3, 5, 130) < 0.5
    bits = pack_bits(kept)
    assert bits.shape == (2, 3, 5, 3)
    assert torch.equal(unpack_bits(bits, 130), kept)


def test_opcheck():
    case = make_case(q_len=200, k_len=333, batch=2, padding="holes", dtype=torch.float32)
    tsa = torch.ops.tsa
    torch.library.opcheck(tsa.padding_range.default, (case.key_mask,))
    torch.library.opcheck(tsa.key_block_means.default, (case.k, *case.padding))
    choose = (case.q, case.k, *tsa.key_block_means(case.k, *case.padding), *case.padding, case.scale, [0.1], 32, 64, 4, 0)
    torch.library.opcheck(tsa.select_key_blocks.default, choose)
    bits = tsa.select_key_blocks(*choose)
    assert bits.shape == (2, 4, row_block_count(200, 333), word_count(333))
    for need_lse in (False, True):
        attend = (case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, need_lse)
        torch.library.opcheck(tsa.key_block_attention.default, attend)


def test_padding_range():
    mask = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    start, lengths = torch.ops.tsa.padding_range(mask)
    assert lengths.tolist() == [3, 6, 0]
    assert start.tolist()[:2] == [2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(alpha=[1.0]), r"alpha must be one number in \[0, 1\).*got \[1.0\]"),
        (dict(alpha=[0.1, 0.2]), "one for each of 4 heads"),
        (dict(pool=48), "pool must divide 128, got 48"),
        (dict(window=0), "window must be >= 1"),
        (dict(share="all"), "share must be one of"),
        (dict(k_len=99), "do not fit q .* and k_len 99"),
        (dict(k_len=310, q_rows=320), "320 queries for 310 keys"),
        (dict(start=torch.zeros(1)), "start must be contiguous int32"),
        (dict(mask=torch.ones(1, 310).bool()), r"key_mask must be bool \(1, 320\)"),
    ],
)
def test_a_bad_argument_is_named(changes, message):
    case = make_case(q_len=320 if "q_rows" in changes else 200, k_len=320, dtype=torch.float32)
    rule = {**RULE, "share": "head", "start": None, **changes}
    k = case.k[:, :, : rule.pop("k_len", 320)]
    rule.pop("q_rows", None)
    means = torch.ops.tsa.key_block_means(case.k, None, None, None)
    share, start, mask = (rule.pop(x, None) for x in ("share", "start", "mask"))
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.select_key_blocks(case.q, k, *means, start, None, mask, scale=case.scale, share=share, **rule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bits=torch.zeros(1, 4, 2, 1, dtype=torch.int64)), r"bits must be \[B, H or Hk, 3, 1\], got \(1, 4, 2, 1\)"),
        (dict(bits=torch.zeros(1, 4, 3, 1)), "bits must be contiguous 4-d int64"),
        (dict(blocks=torch.zeros(1, 5)), r"blocks must be int32 \[1, P\]"),
    ],
)
def test_a_bad_argument_of_the_attention_is_named(changes, message):
    case = make_case(q_len=200, k_len=320, dtype=torch.float32)
    rest = {"bits": torch.zeros(1, 4, 3, 1, dtype=torch.int64), "blocks": None, **changes}
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.key_block_attention(
            case.q, case.k, case.v, block=64, start=None, lengths=None, key_mask=None, scale=1.0, need_lse=False, **rest
        )
