"""Context-parallel prefill on gloo ranks: the key blocks and the output of one process with every row."""

from __future__ import annotations

import os
import random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from tests.ranks import run_ranks
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.group import default_group
from tsa_compile.kernels.common.zigzag import ZigZag, gathered, key_blocks_of
from tsa_compile.kernels.context_pages import travelled
from tsa_compile.kernels.context_select import Prompt, Rule, chosen
from tsa_compile.kernels.kept import key_blocks
from tsa_compile.recorder import record_kept

RULES = [  # alpha, pool, window, sinks, last_dense, share, lookahead
    ((0.3,), 128, 64, 4, 128, "head", True),
    ((0.2, 0.6, 0.9, 0.4), 32, 256, 0, 200, "head", True),
    ((0.5,), 64, 1, 70, 1, "group", True),
    ((0.4,), 128, 64, 4, 0, "head", False),
    ((0.0,), 128, 64, 0, 0, "head", True),
]


@given(st.integers(0, 3000), st.integers(1, 9000), st.integers(1, 9))
def test_every_row_and_every_new_key_block_is_with_one_rank(past, new, ranks):
    cut = ZigZag(past, past + new, ranks)
    assert [n for chunk in cut.chunks for n in chunk] == list(range(past, past + new))
    blocks = [n for chunk in cut.chunks for n in key_blocks_of(chunk)]
    assert blocks == list(range(past // 64, -(-(past + new) // 64)))
    assert sum(map(cut.rows, range(ranks))) == new
    assert all(a.stop <= b.start for a, b in map(cut.of, range(ranks)))


def case(length, past, kind, dtype=torch.float64, seed=0):
    """Queries of the rows behind `past`, and keys with blocks that stand out; a mask of `kind`: none, left, right or holes."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, length, d, generator=rng, dtype=torch.float64) for h, d in ((4, 16), (2, 16), (2, 24)))
    k += 3 * torch.randn(2, 2, -(-length // 64), 16, generator=rng, dtype=torch.float64).repeat_interleave(64, 2)[:, :, :length]
    mask = torch.ones(2, length, dtype=torch.bool)
    if kind == "left":
        mask[0, : length // 3] = False
    if kind == "right":
        mask[1, length // 2 :] = False
    if kind == "holes":
        mask[0, 70:200] = False
        mask[1, -150:-130] = False
    return *(x.to(dtype) for x in (q[:, :, past:], k, v)), None if kind == "none" else mask


def padding_of(mask):
    return (None, None, None) if mask is None else (*torch.ops.tsa.padding_range(mask), mask)


def one_process(q, k, v, mask, rule):
    """(bitmap, output) of one process with every row."""
    alpha, *rest, share, lookahead = rule
    padding = padding_of(mask)
    means, counts = torch.ops.tsa.key_block_means(k, *padding)
    given = (q, k, means, counts, *padding, 0.25, list(alpha), *rest)
    bits = torch.ops.tsa.select_key_blocks(*given, share=share, lookahead=lookahead)
    return bits, torch.ops.tsa.key_block_attention(q, k, v, bits, None, 1, *padding, 0.25, False)[0]


def shared(x, cut, past):
    """This rank's rows of `x` `[B, H, length - past, D]`."""
    return x[:, :, torch.cat([torch.tensor([*chunk], dtype=torch.long) for chunk in cut.of(dist.get_rank())]) - past]


def on_ranks(cases):
    for (length, past, rule), (q, k, v, mask), (bits, whole) in cases:
        cut = ZigZag(past, length, dist.get_world_size())
        queries, expected = shared(q, cut, past), shared(whole, cut, past)
        keys, values = (torch.cat([x[:, :, :past], shared(x[:, :, past:], cut, past)], 2) for x in (k, v))
        own_mask = None if mask is None else torch.cat([mask[:, :past], shared(mask[:, None, past:], cut, past)[:, 0]], 1)
        alpha, *rest = rule
        with record_kept(group=default_group()) as kept:
            args = (queries, keys, values, own_mask, 0.25, list(alpha), *rest, default_group())
            out = torch.ops.tsa.context_parallel_attention(*args)
        assert out.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5 if q.dtype == torch.float32 else 1e-12)
        assert kept.shares() == [pytest.approx(share_of(bits, q, k))]
        prompt = Prompt(cut, dist.get_rank(), default_group(), *padding_of(mask))
        lists = chosen(prompt, queries, keys, Rule(0.25, *rule))
        for (_, chunk), own in zip(prompt.own, lists, strict=True):
            first = chunk.start // 128 - past // 128
            assert torch.equal(own, bits[:, :, first : first + own.shape[2], : own.shape[3]]), (length, past, rule)
        assert torch.equal(gathered(values[:, :, past:], cut, default_group()), v[:, :, past:])
        only_what_is_read(prompt, travelled(prompt, keys, values, lists), (k, v), lists)
    return True


def only_what_is_read(prompt, found, whole, lists):
    """Of the blocks of other ranks those are here that a bitmap names, and zeros elsewhere."""
    past, length, _ = prompt.cut
    position, there = torch.arange(length), torch.zeros(2, 2, length, dtype=torch.bool)
    there[..., :past] = True
    for _, chunk in prompt.own:
        there[..., chunk.start : chunk.stop] = True
    for bits in lists:
        named = (bits.unflatten(1, (2, -1))[..., position // 4096 % bits.shape[3]] >> position // 64 % 64) & 1
        there |= (named.bool() & (position // 4096 < bits.shape[3])).any(3).any(2)
    for x, rows in zip(found, whole, strict=True):
        assert torch.equal(x[:, :, :length], torch.where(there[..., None], rows, 0))


def share_of(bits, q, k):
    kept, of = key_blocks(bits, (q, k), {})
    return int(kept.sum()) / (of * len(kept))


def random_cases(number, longest, seed, dtype):
    rng = random.Random(seed)
    for n in range(number):
        length = rng.choice([rng.randrange(1, 300), rng.randrange(300, longest)])
        past, rule = rng.choice([0, 0, rng.randrange(length)]), RULES[n % len(RULES)]
        tensors = case(length, past, rng.choice(["none", "left", "right", "holes"]), dtype, n)
        yield (length, past, rule), tensors, one_process(*tensors, rule)


@pytest.mark.parametrize(("ranks", "dtype", "number"), [(2, torch.float64, 10), (2, torch.float32, 3), (4, torch.float64, 5)])
def test_the_blocks_and_the_output_of_one_process(ranks, dtype, number):
    found = run_ranks(ranks, on_ranks, list(random_cases(number, 1200, ranks, dtype)))
    assert found == [True] * ranks, "".join(map(str, found))


def attend_once(rows=None, group=None, heads=4, alpha=0.3):
    """A prompt of 600 rows; `rows`: of this rank, in place of those that it should have."""
    q, k, v, _ = case(600, 0, "none", torch.float32)
    cut = ZigZag(0, 600, dist.get_world_size())
    own = [shared(x, cut, 0)[:, :, :rows] for x in (q[:, :heads], k, v)]
    args = (None, 0.25, [alpha], 128, 64, 4, 128, "head", True, group or default_group())
    return torch.ops.tsa.context_parallel_attention(*own, *args)


def uneven():
    return attend_once(rows=100 if dist.get_rank() else None)


def unlike():
    return attend_once(heads=2 if dist.get_rank() else 4, alpha=0.2)


def other_rule():
    return attend_once(alpha=0.3 if dist.get_rank() else 0.2)


def one_ends():
    attend_once()
    if dist.get_rank() == 1:
        os._exit(1)
    attend_once()


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (uneven, r"the ranks of group '0' have [344, 100] rows; of 444 in zig-zag order it is [188, 256]"),
        (unlike, "ranks of group '0' differ in heads: 4 on rank 0, 2 on rank 1"),
        (other_rule, "ranks of group '0' differ in the rule (its hash)"),
    ],
)
def test_ranks_that_differ_are_told_so_on_both(work, message):
    for found in run_ranks(2, work):
        assert message in found, found


def test_a_rank_that_ends_is_an_error_on_the_others():
    left, ended = run_ranks(2, one_ends)
    assert ended is None
    assert "GroupError: group '0': a rank has ended, or takes no part in this call" in left


def test_a_group_that_is_not_there():
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match="no process group: start with torchrun"):
        torch.ops.tsa.context_parallel_attention(x, x, x, None, 1.0, [0.1], 128, 64, 4, 0, "head", True, "0")
    first, _ = run_ranks(2, attend_once, None, "other")
    assert "GroupError: group 'other': this process is in no process group of that name" in first


def test_a_graph_knows_the_result_without_the_ranks():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, h, 300, d, dtype=torch.bfloat16) for h, d in ((4, 16), (2, 16), (2, 24)))
        out = torch.ops.tsa.context_parallel_attention(q, k, v, None, 0.25, [0.3], 128, 64, 4, 128, "head", True, "0")
    assert out.shape == (2, 4, 300, 24)
    assert out.transpose(1, 2).is_contiguous()
