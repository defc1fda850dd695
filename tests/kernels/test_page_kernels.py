"""The Triton kernels of block-sparse prefill against their references, whose own tests are in test_page_reference.py."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.page_cases import SHAPES, dense_attention, make_case, moved, visible_keys
from tsa_compile.kernels.attend.pages.reference import key_block_attention_reference
from tsa_compile.kernels.common.mask_range import mask_range
from tsa_compile.kernels.common.row_blocks import FLAGS, KEYS, keys_of_blocks, row_block_count, valid_keys, valid_range
from tsa_compile.kernels.common.view import padding_range
from tsa_compile.kernels.score.page_mass.reference import key_block_means_reference
from tsa_compile.kernels.select.threshold_pages.reference import (
    block_masses,
    forced_blocks,
    pack_bits,
    select_key_blocks_reference,
    unpack_bits,
)
from tsa_compile.kernels.types import KvView, Operands

pytest.importorskip("triton")
from tsa_compile.kernels import compose_blocks
from tsa_compile.kernels.attend.pages import hopper
from tsa_compile.kernels.attend.pages import host as attend
from tsa_compile.kernels.score.page_mass import host as page_mass
from tsa_compile.kernels.select.threshold_pages import host as threshold

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# ||out - ref|| / ||ref||: rounding of the output (and of p before the second product) in half types; tf32x3 in float32
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN, so an element that no kernel wrote fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES)
def test_means(shape):
    case = moved(make_case(**SHAPES[shape]), torch.float32, DEVICE)
    got = page_mass.key_block_means(case.k, *case.padding)
    torch.testing.assert_close(got, key_block_means_reference(case.k, *case.padding), rtol=1e-5, atol=1e-6)


def check_choice(case, got, alpha, pool, window, sinks, last_dense, slack):
    """Every block is kept that the rule keeps and no other, but where its mass is within a factor of `slack` of the threshold."""
    k_len, q_len = case.k.shape[2], case.q.shape[2]
    exact = moved(case, torch.float64, "cpu")
    first, end = valid_range(case.q.shape[0], k_len, exact.start, exact.lengths, torch.device("cpu"))
    means, counts = key_block_means_reference(exact.k, *exact.padding)
    masses = block_masses(exact.q, means, counts, first, end, exact.key_mask, k_len, case.scale, pool)
    visible, forced = forced_blocks(q_len, k_len, first, end, counts, window, sinks, last_dense)
    free = (visible & ~forced)[:, None]
    ratio = masses / torch.where(free, masses, 0).amax(-1, keepdim=True)
    clear = ~free | ((ratio / alpha).log().abs() > math.log(slack))
    want = (forced & visible)[:, None] | (free & (ratio >= alpha) & (masses > 0))
    clear |= masses == 0
    kept = unpack_bits(got.cpu(), masses.shape[-1])
    assert torch.equal(torch.where(clear, kept, want), want)
    assert clear.float().mean() > 0.9
    assert int((unpack_bits(got.cpu(), got.shape[-1] * 64)[..., masses.shape[-1] :]).sum()) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool", [128, 16])
def test_choice(shape, pool):
    case = moved(make_case(**SHAPES[shape]), torch.float32, DEVICE)
    means = page_mass.key_block_means(case.k, *case.padding)
    rule = (pool, 70, 3, 40)
    got = threshold.select_key_blocks(case.q, *means, *case.padding, case.k.shape[2], case.scale, [0.3], *rule)
    check_choice(case, got, 0.3, *rule, slack=1.001)


@pytest.mark.parametrize("pool", [1, 8, 32, 64])
def test_choice_by_other_pools(pool):
    case = moved(make_case(q_len=390, k_len=520, heads=2, kv_heads=1, batch=2, padding="left"), torch.float32, DEVICE)
    means = page_mass.key_block_means(case.k, *case.padding)
    got = threshold.select_key_blocks(case.q, *means, *case.padding, 520, case.scale, [0.2], pool, 1, 0, 0)
    check_choice(case, got, 0.2, pool, 1, 0, 0, slack=1.001)


@pytest.mark.parametrize("shape", ["chunk", "holes"])
def test_the_three_operations_in_one_call(shape):
    case = moved(make_case(**SHAPES[shape]), torch.float32, DEVICE)
    k_len, rule = case.k.shape[2], (128, 70, 3, 40, "head", True)
    x = Operands(case.q, case.k, case.v, case.key_mask, KvView(None, 1, case.start, case.lengths))
    got = compose_blocks.block_sparse_attention(x, None, case.scale, [0.3], *rule)
    means = page_mass.key_block_means(case.k, *case.padding)
    bits = threshold.select_key_blocks(case.q, *means, *case.padding, k_len, case.scale, [0.3], *rule)
    want = key_block_attention_reference(case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, False)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_choice_tells_the_attention_where_the_mask_has_holes():
    case = make_case(**SHAPES["holes"])
    assert case.key_mask is not None
    case.key_mask[1] = torch.arange(400) > 70  # none between the first and the last
    start, lengths = padding_range(case.key_mask)
    case = moved(case._replace(start=start, lengths=lengths), torch.float32, DEVICE)
    flags = torch.full((FLAGS + 2,), 7, dtype=torch.int32, device=DEVICE)
    means = page_mass.key_block_means(case.k, *case.padding)
    threshold.select_key_blocks(case.q, *means, *case.padding, 400, case.scale, [0.3], 128, 70, 3, 40, flags=flags)
    assert flags.tolist() == [0, 7, 7, 7, 1, 0]
    assert hopper._holes(case.start, case.lengths, case.key_mask).tolist() == [True, False]


def test_more_than_one_word_of_a_bitmap():
    case = moved(make_case(q_len=140, k_len=64 * 64 + 300, heads=1, kv_heads=1), torch.float32, DEVICE)
    means = page_mass.key_block_means(case.k, None, None, None)
    got = threshold.select_key_blocks(case.q, *means, None, None, None, case.k.shape[2], case.scale, [0.05], 32, 128, 4, 0)
    check_choice(case, got, 0.05, 32, 128, 4, 0, slack=1.001)


def test_alpha_by_head_zero_and_group():
    case = moved(make_case(q_len=500, k_len=500), torch.float32, DEVICE)
    means, alpha = page_mass.key_block_means(case.k, None, None, None), [0.0, 0.5, 0.9, 0.1]
    for share in ("head", "group"):
        rule = (500, case.scale, alpha, 32, 64, 4, 0, share)
        assert torch.equal(
            threshold.select_key_blocks(case.q, *means, None, None, None, *rule),
            select_key_blocks_reference(case.q, *means, None, None, None, *rule),
        )


@pytest.mark.parametrize("shape", ["plain", "both, a chunk"])
def test_choice_without_lookahead(shape):
    case = moved(make_case(**SHAPES[shape]), torch.float32, DEVICE)
    means = page_mass.key_block_means(case.k, *case.padding)
    rule = (case.k.shape[2], case.scale, [0.6], 32, 20, 3, 0, "head", False)
    got = threshold.select_key_blocks(case.q, *means, *case.padding, *rule)
    want = select_key_blocks_reference(case.q, *means, *case.padding, *rule)
    ahead = select_key_blocks_reference(case.q, *means, *case.padding, *rule[:-1])
    assert torch.equal(got, want)
    assert not torch.equal(want, ahead)


def test_scores_that_are_not_finite_keep_the_forced_blocks_alone():
    case = moved(make_case(q_len=500, k_len=500, heads=2, kv_heads=2), torch.float32, DEVICE)
    case.k[:, 1] = torch.nan
    means = page_mass.key_block_means(case.k, None, None, None)
    rule = (500, case.scale, [0.5], 32, 64, 4, 0)
    got = threshold.select_key_blocks(case.q, *means, None, None, None, *rule)
    assert torch.equal(got, select_key_blocks_reference(case.q, *means, None, None, None, *rule))


def random_bits(case, seed=0, share=0.4, per_head=True):
    """Any bitmap: bits of key blocks behind the row block or in padding are set too, and are not to be read."""
    g = torch.Generator().manual_seed(seed)
    k_len, lists = case.k.shape[2], (case.q if per_head else case.k).shape[1]
    shape = (case.q.shape[0], lists, row_block_count(case.q.shape[2], k_len), -(-k_len // KEYS))
    return pack_bits(torch.rand(shape, generator=g) < share).to(DEVICE)


def attention_error(case, bits, need_lse=True):
    out, lse = attend.key_block_attention(case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, need_lse)
    want, want_lse = dense_attention(case, visible_keys(case, bits))
    assert out.transpose(1, 2).is_contiguous()
    empty = want_lse == -math.inf
    assert (out.cpu()[empty] == 0).all()
    if need_lse:
        torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=0, atol=2e-2 if case.q.dtype == torch.bfloat16 else 3e-3)
    else:
        assert lse.numel() == 0
    return float((out.cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape):
    case = moved(make_case(**SHAPES[shape]), torch.float32, DEVICE)
    assert attention_error(case, random_bits(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("share", "per_head", "need_lse"), [(0.0, True, True), (1.0, True, False), (0.5, False, True)])
def test_attention_over_other_bitmaps(share, per_head, need_lse):
    case = moved(make_case(q_len=300, k_len=450, heads=2, kv_heads=1), torch.float32, DEVICE)
    assert attention_error(case, random_bits(case, share=share, per_head=per_head), need_lse) < TOLERANCE[torch.float32]


def test_padding_may_hold_anything():
    case = moved(make_case(q_len=300, k_len=300, batch=2, heads=2, padding="both"), torch.float32, DEVICE)
    first, end = valid_range(2, 300, case.start, case.lengths, case.k.device)
    at = torch.arange(300, device=DEVICE)
    hidden = (at < first[:, None]) | (at >= end[:, None])
    bits = random_bits(case)
    for x in (case.k, case.v):
        x.transpose(1, 2)[hidden] = torch.nan
    got = attend.key_block_attention(case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, True)
    for x in (case.k, case.v):
        x.transpose(1, 2)[hidden] = 0
    want = attend.key_block_attention(case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_keys_of_blocks_count_padding_out():
    first, end = torch.tensor([0, 70]), torch.tensor([130, 100])
    assert keys_of_blocks(valid_keys(150, first, end, None)).tolist() == [[64, 64, 2], [0, 30, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("padding", [None, "both"])
def test_attention_by_dtype(dtype, dim, padding):
    batch = 1 if padding is None else 3
    for q_len, k_len, heads, kv_heads in ((1500, 1500, 8, 2), (700, 1500, 7, 1)):
        case = moved(make_case(q_len, k_len, batch, heads, kv_heads, dim, padding=padding), dtype, "cuda")
        for share in (0.0, 0.3, 1.0):
            assert attention_error(case, random_bits(case, share=share)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("shape", [*(name for name in SHAPES if name != "head dims"), "more tiles than programs"])
def test_every_shape_by_heads_of_a_size_of_its_own(dtype, dim, shape):
    """Hopper's own kernels take these; head dim 256 has one of its own."""
    given = SHAPES.get(shape, dict(q_len=3000, k_len=3100, heads=16, kv_heads=4, batch=2, padding="left"))
    case = moved(make_case(**given, dim=dim), dtype, "cuda")
    for share in (0.0, 0.4, 1.0):
        assert attention_error(case, random_bits(case, share=share)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_weights_far_above_the_first_blocks(dtype, dim):
    """Keys whose scores pass those of the row's own block by far: the tile is done again with a running maximum."""
    case = moved(make_case(1000, 1000, dim=dim), dtype, "cuda")
    case.k[:, :, 200:300] *= 30
    case.q[:, :, ::7] *= 8
    assert attention_error(case, random_bits(case, share=0.8)) < 2 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [128, 16, 4])
def test_choice_in_half_precision(dtype, pool):
    case = moved(make_case(5000, 5000, 2, 8, 2, 128, padding="left"), dtype, "cuda")
    means = page_mass.key_block_means(case.k, *case.padding)
    got = threshold.select_key_blocks(case.q, *means, *case.padding, 5000, case.scale, [0.05], pool, 256, 4, 128)
    check_choice(case, got, 0.05, pool, 256, 4, 128, slack=1.05)


@pytest.mark.gpu
def test_no_synchronisation_and_graph_replay():
    case = moved(make_case(1500, 1500, 2, 8, 2, 128, padding="left"), torch.bfloat16, "cuda")

    def run():
        means = page_mass.key_block_means(case.k, *case.padding)
        bits = threshold.select_key_blocks(case.q, *means, *case.padding, 1500, case.scale, [0.1], 16, 256, 4, 128)
        return attend.key_block_attention(case.q, case.k, case.v, bits, None, 1, *case.padding, case.scale, False)[0]

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


@pytest.mark.parametrize("k_len", [1, 300, 8192, 8193])
def test_the_range_of_a_mask(k_len):
    """Of masks with holes, without any key, of rows far apart and of every other column."""
    wide = torch.rand(7, 2 * k_len, device=DEVICE) < 0.3
    wide[1:3], wide[3], wide[4, : k_len // 2], wide[5, k_len // 2 :] = False, True, False, False
    for mask in (wide[:, :k_len], wide[::2, ::2], wide[:, :k_len].contiguous(), wide[:0]):
        got, want = mask_range(mask), padding_range(mask)
        assert all(map(torch.equal, got, want))
