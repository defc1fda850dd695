"""Attention and page selection over keys that are spread over gloo ranks, against one process with every key."""

from __future__ import annotations

import os
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import run_ranks
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.group import default_group
from tsa_compile.kernels.common.spread import positions, rows_held
from tsa_compile.kernels.routed import merge_in_tree, sharing
from tsa_compile.kernels.types import Attended

LENGTHS = (1, 5, 16, 17, 64, 131, 300)  # of the first: one rank alone holds keys


def tensors(length, dtype=torch.float32, batch=2, heads=4, kv_heads=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, 1, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim + 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def held(x, length, room=3):
    """This rank's rows of `x` `[B, Hk, length, D]`, in a buffer with `room` more rows that hold NaN; and their number."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = rows_held(length, rank, ranks)
    buffer = x.new_full((*x.shape[:2], rows + room, x.shape[3]), torch.nan)
    buffer[:, :, :rows] = x[:, :, positions(rows, rank, ranks)]
    return buffer, torch.full((x.shape[0],), rows, dtype=torch.int32)


def dense(q, k, v, key_mask=None):
    mask = None if key_mask is None else key_mask[:, None, None]
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)


@given(st.integers(0, 5000), st.integers(1, 9))
def test_every_row_is_held_once(length, ranks):
    parts = [positions(rows_held(length, r, ranks), r, ranks) for r in range(ranks)]
    assert torch.equal(torch.cat(parts).sort()[0], torch.arange(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 16


def routed(dtype):
    found = []
    for length in LENGTHS:
        q, k, v = tensors(length, dtype)
        (keys, rows), (values, _) = held(k, length), held(v, length)
        out, lse = torch.ops.tsa.routed_attention(q, keys, values, None, None, None, rows, None, 0.4, False, default_group())
        scores = torch.einsum("bgid,bgjd->bgij", q.double().unflatten(1, (2, 2)).flatten(0, 0).flatten(2, 3), k.double()) * 0.4
        whole = torch.logsumexp(scores.flatten(1, 2), -1)[..., None]
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.4, enable_gqa=True)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=3 * float(torch.finfo(out.dtype).eps) + 1e-6)
        torch.testing.assert_close(lse.double(), whole, rtol=1e-5, atol=1e-5)
        gathered = torch.ops.tsa.gather_rows(keys[:, :, : int(rows[0])], length, default_group())
        assert torch.equal(gathered, k)
        found.append(out)
    return found


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float64), (2, torch.bfloat16), (4, torch.float32)])
def test_every_rank_gets_dense_attention_to_the_last_bit_alike(ranks, dtype):
    first, *others = run_ranks(ranks, routed, dtype)
    assert not isinstance(first, str), first
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_parts_may_come_in_any_order_but_are_joined_in_one():
    """The tree is by rank: the same parts give the same bits, and the whole is right whatever lies in empty parts."""
    parts = []
    for seed in range(5):
        q, k, v = tensors(9, seed=seed)
        out, lse, _ = torch.ops.tsa.decode_attention(q, k, v, None, 1, None, None, None, 0.4)
        parts.append(Attended(out, lse))
    parts[3] = Attended(torch.full_like(parts[3].out, torch.nan), torch.full_like(parts[3].lse, -torch.inf))
    whole = merge_in_tree(parts)
    weights = torch.softmax(torch.stack([p.lse.double() for p in parts]), 0)[..., None]
    expected = sum(w * p.out.double() for w, p in zip(weights, parts, strict=True) if p.lse[0, 0, 0] > -torch.inf)
    torch.testing.assert_close(whole.out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merge_in_tree(parts).out, whole.out)


def own_queries():
    """Each rank asks with queries of its own, about one corpus that all ranks hold together."""
    length, rank = 100, dist.get_rank()
    _, k, v = tensors(length, batch=1)
    q = tensors(length, seed=1 + rank)[0]
    (keys, rows), (values, _) = held(k, length), held(v, length)
    everyone = 2 * dist.get_world_size()
    keys, values = (x.expand(everyone, -1, -1, -1) for x in (keys, values))
    args = (None, None, None, rows.expand(everyone).contiguous(), None, 8**-0.5, True, default_group())
    out, _ = torch.ops.tsa.routed_attention(q, keys, values, *args)
    torch.testing.assert_close(out.double(), dense(q, *(x.expand(2, -1, -1, -1) for x in (k, v))), rtol=0, atol=1e-6)
    return out


def test_queries_travel_to_a_shared_corpus():
    first, second = run_ranks(2, own_queries)
    assert not isinstance(first, str), first
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def own_rows():
    """Requests with keys of their own, which each rank has alone, behind a corpus that all ranks hold together."""
    length, rank = 40, dist.get_rank()
    _, corpus, values = tensors(length, batch=1)
    q, k, v = tensors(9 + rank, seed=1 + rank)
    shared = [held(x, length, room=0)[0] for x in (corpus, values)]
    args = (None, None, None, None, None, 8**-0.5, False, default_group())
    with sharing(lambda keys: shared if keys is k else None):
        out, lse = torch.ops.tsa.routed_attention(q, k, v, *args)
        with pytest.raises(ValueError, match="a corpus that requests share is read whole"):
            torch.ops.tsa.routed_attention(q, k, v, torch.zeros(2, 2, 1).int(), torch.ones(2, 2).int(), *args[2:])
    keys, rows = (torch.cat([x.expand(2, -1, -1, -1), y], 2) for x, y in ((corpus, k), (values, v)))
    torch.testing.assert_close(out.double(), dense(q, keys, rows), rtol=0, atol=1e-6)
    scores = torch.einsum("bgid,bgjd->bgij", q.double().unflatten(1, (2, 2)).flatten(2, 3), keys.double()) * 8**-0.5
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores.flatten(1, 2), -1)[..., None], rtol=1e-5, atol=1e-5)
    return True


@pytest.mark.parametrize("ranks", [2, 4])
def test_own_rows_behind_a_shared_corpus(ranks):
    """Of 4 ranks one holds no row of the corpus."""
    assert run_ranks(ranks, own_rows) == [True] * ranks


RULES = [  # keep, table, mass, sinks, recent
    ([0.3], [0], 0.0, 1, 3),
    ([0.5, 0.1], [0], 0.0, 2, 1),
    ([0.0], [7], 0.0, 0, 1),
    ([0.0], [2, 5], 0.0, 1, 1),
    ([0.0], [0], 0.9, 1, 2),
    ([0.0], [0], 0.2, 3, 2),
    ([1.0], [0], 0.0, 1, 3),
]


def chosen_pages(q, k, rule, key_mask):
    """bool `[B, Hk, pages]`, by the operators for one process."""
    capacity = k.shape[2]
    start, lengths = torch.ops.tsa.padding_range(key_mask)
    sums, counts = torch.ops.tsa.page_sums(k, None, 1, start, lengths, key_mask)
    pages = (None, 1, start, lengths, capacity)
    logits, parts = torch.ops.tsa.page_scores(q, sums, counts, *pages, 0.4)
    keep, table, mass, sinks, recent = rule
    lists = torch.ops.tsa.select_pages(logits, parts, counts, *pages, 2, keep, table, mass, sinks, recent)
    return of_lists(*lists, -(-capacity // 16))


def of_lists(indices, counts, pages):
    chosen = torch.zeros(*counts.shape, pages, dtype=torch.bool)
    for b in range(counts.shape[0]):
        for g in range(counts.shape[1]):
            chosen[b, g, indices[b, g, : counts[b, g]].long()] = True
    assert torch.equal(chosen.sum(-1), counts.long())
    return chosen


def page_case(seed):
    """Keys with a few that stand out, some with scores alike (pages repeated), padding on the left, holes."""
    rng = random.Random(seed)
    length = rng.choice([rng.randrange(1, 40), rng.randrange(40, 900)])
    q, k, _ = tensors(length, torch.float64, seed=seed)
    k = k * rng.choice([0.01, 1.0, 6.0])
    if rng.random() < 0.5:
        k[:, :, : length // 2] = k[:, :, :1]
    key_mask = torch.ones(2, length, dtype=torch.bool)
    key_mask[1, : rng.choice([0, 3, 16, 50])] = False
    if rng.random() < 0.3:
        key_mask[0, 20:60] = False
    key_mask[:, -1] = True
    return q, k, key_mask, length


def selections(seeds):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for seed in seeds:
        q, k, key_mask, length = page_case(seed)
        keys, rows = held(k, length)
        place = positions(int(rows[0]), rank, ranks)
        mask = torch.zeros(2, keys.shape[2], dtype=torch.bool)
        mask[:, : len(place)] = key_mask[:, place]
        sums, counts = torch.ops.tsa.page_sums(keys, None, 1, None, rows, mask)
        for rule in RULES:
            args = (q, sums, counts, None, rows, keys.shape[2], 0.4, *rule, default_group())
            own = of_lists(*torch.ops.tsa.routed_pages(*args), -(-keys.shape[2] // 16))
            expected = chosen_pages(q, k, rule, key_mask)
            mine = expected[..., rank::ranks]
            assert torch.equal(own[..., : mine.shape[2]], mine), (seed, rule, length)
            assert not own[..., mine.shape[2] :].any()
    return True


@pytest.mark.parametrize(("ranks", "seeds"), [(2, range(14)), (3, range(14, 18))])
def test_ranks_choose_the_pages_that_one_process_would(ranks, seeds):
    assert run_ranks(ranks, selections, seeds) == [True] * ranks


def attend_once(length=40, group=None, kv_heads=2):
    q, k, v = tensors(length, kv_heads=kv_heads)
    (keys, rows), (values, _) = held(k, length), held(v, length)
    args = (None, None, None, rows, None, 0.4, False, group or default_group())
    return torch.ops.tsa.routed_attention(q, keys, values, *args)[0]


def one_ends():
    attend_once()
    if dist.get_rank() == 1:
        os._exit(1)
    attend_once()


def test_a_rank_that_ends_is_an_error_on_the_others():
    left, ended = run_ranks(2, one_ends)
    assert ended is None
    assert "GroupError: group '0': a rank has ended, or takes no part in this call" in left


def unlike():
    rank = dist.get_rank()
    if rank == 0:
        return attend_once()
    return attend_once(kv_heads=4)


def test_ranks_that_differ_are_told_so_on_both():
    for found in run_ranks(2, unlike):
        assert "tsa::routed_attention: ranks of group '0' differ in KV heads: 2 on rank 0, 4 on rank 1" in found


def test_a_group_that_is_not_there():
    with pytest.raises(RuntimeError, match="no process group: start with torchrun"):
        torch.ops.tsa.routed_attention(*tensors(3), None, None, None, None, None, 0.4, False, "0")
    first, _ = run_ranks(2, attend_once, 40, "other")
    assert "GroupError: group 'other': this process is in no process group of that name; its groups are ['0']" in first


def meta_results():
    q, k, v = tensors(40)
    step = torch.compile(
        lambda q, k, v: torch.ops.tsa.routed_attention(q, k, v, None, None, None, None, None, 0.4, False, default_group())[0],
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    half = [held(x, 40, room=0)[0] for x in (k, v)]
    torch.testing.assert_close(step(q, *half).double(), F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), scale=0.4, enable_gqa=True), rtol=0, atol=1e-6)  # fmt: skip
    return True


def test_in_one_graph():
    assert run_ranks(2, meta_results) == [True, True]
