"""`tsa::list_keys`, `tsa::crop_list` and `tsa::listed_attention`: lists that a verify step leaves for drafts."""

from __future__ import annotations

import math

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.attend.decode import config, listed_host
from tsa_compile.kernels.attend.decode.listed_host import listed_attention
from tsa_compile.kernels.attend.decode.reference import listed_attention_reference
from tsa_compile.kernels.state.listed_keys.host import crop_list, list_keys
from tsa_compile.kernels.state.listed_keys.reference import crop_list_reference, list_keys_reference, ranks

tsa = torch.ops.tsa
BATCH, HEADS, KV_HEADS, LENGTH, DIM = 3, 6, 2, 70, 16
CASES = {"some": (9, 0.0), "a share": (2, 0.3), "all": (99, 0.0), "one": (1, 0.0), "rounded up": (1, 0.11)}


def verify_step(rows, dtype=torch.float64):
    """Query rows behind 60, 33 and 0 rows of a cache, the first 5 of the first padded: (scores, lse, begin), ..."""
    q, k, v = (torch.randn(BATCH, h, n, DIM, dtype=dtype) for h, n in ((HEADS, rows), (KV_HEADS, LENGTH), (KV_HEADS, LENGTH)))
    begin = torch.tensor([60, 33, 0], dtype=torch.int32)
    key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    key_mask[0, :5] = False
    lengths = begin + rows
    _, lse, scores = tsa.decode_attention(3 * q, k, v, None, 1, None, lengths, key_mask, 0.25, scores=True)
    return scores, lse, begin, (3 * q, k, key_mask)


def lists(room=64):
    """(since, counts, indices), of another step."""
    since, counts = torch.full((BATCH,), 7, dtype=torch.int32), torch.full((BATCH, KV_HEADS), 3, dtype=torch.int32)
    return since, counts, torch.full((BATCH, KV_HEADS, room), -5, dtype=torch.int32)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_lists_are_the_definition(rows, name):
    """The mean softmax of the first and the last row, over all keys that they see; of those before the step the heaviest."""
    keys, share = CASES[name]
    scores, lse, begin, (q, k, key_mask) = verify_step(rows)
    since, counts, indices = lists()
    tsa.list_keys(since, counts, indices, scores, lse, begin, keys, share)
    assert torch.equal(since, begin)
    for b in range(BATCH):
        before = [j for j in range(int(begin[b])) if key_mask[b, j]]
        for g in range(KV_HEADS):
            mass = dict.fromkeys(before, 0.0)
            for h in range(3 * g, 3 * g + 3):
                for r in (0, rows - 1):
                    seen = [j for j in range(int(begin[b]) + r + 1) if key_mask[b, j]]
                    weights = torch.softmax(0.25 * k[b, g, seen] @ q[b, h, r], 0).tolist()
                    for j, weight in zip(seen, weights, strict=True):
                        mass[j] = mass.get(j, 0.0) + weight
            wanted = min(len(before), max(keys, math.ceil(share * len(before))))
            best = sorted(before, key=lambda j: (-mass[j], j))[:wanted]
            assert counts[b, g] == wanted
            assert indices[b, g, :wanted].tolist() == sorted(best)


def test_ties_go_to_the_lowest_position_and_what_is_not_finite_weighs_nothing():
    scores = torch.zeros(1, 2, 2, 8)
    scores[..., 6], scores[..., 5], scores[..., 2] = 2.0, torch.nan, -torch.inf
    since, counts, indices = (x[:1] for x in lists(4))
    tsa.list_keys(since, counts, indices, scores, torch.zeros(1, 2, 3), torch.tensor([7], dtype=torch.int32), 3, 0.0)
    assert indices[..., :3].tolist() == [[[0, 1, 6]] * 2]
    full = lists(7)[2][:1]
    tsa.list_keys(since, counts, full, scores, torch.zeros(1, 2, 3), torch.tensor([7], dtype=torch.int32), 9, 0.0)
    assert counts.tolist() == [[5, 5]]  # nan is no visible score, and -inf hides
    assert full[0, 0, :5].tolist() == [0, 1, 3, 4, 6]


def same_lists(scores, lse, begin, lists, room, keys, share):
    """Of the kernels and the reference: which keys, where weights are no closer than float32 tells."""
    one, two = ([x.to(scores.device) for x in made] for made in (empty_lists(lists, room), empty_lists(lists, room)))
    list_keys_reference(*one, scores, lse, begin, keys, share)
    list_keys(*two, scores, lse, begin, keys, share)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    weights = ranks(scores.double(), lse.double(), begin, lists)
    for b in range(BATCH):
        for g in range(lists):
            n = int(one[1][b, g])
            a, c = one[2][b, g, :n].long(), two[2][b, g, :n].long()
            assert (c[1:] > c[:-1]).all()
            torch.testing.assert_close(weights[b, g, c].sort().values, weights[b, g, a].sort().values, rtol=1e-5, atol=1e-9)
    return two


def empty_lists(lists, room):
    return (
        torch.full((BATCH,), 7, dtype=torch.int32),
        torch.full((BATCH, lists), 3, dtype=torch.int32),
        torch.full((BATCH, lists, room), -5, dtype=torch.int32),
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("lists", [KV_HEADS, 1], ids=["by head", "one"])
def test_triton_lists_the_same(rows, lists):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores, lse, begin, _ = (x.to(device) if isinstance(x, torch.Tensor) else x for x in verify_step(rows, torch.float32))
    scores[0, 0, 0, 9], scores[1, 2, 1, 3] = torch.nan, torch.inf
    for keys, share in ((6, 0.2), (99, 0.0), (0, 0.0), (3, 1.0)):
        same_lists(scores, lse, begin, lists, 40, keys, share)
    same_lists(scores.half(), lse, begin, lists, 40, 6, 0.2)


@pytest.mark.parametrize("kind", ["spread", "equal", "two values", "one bin", "tiny"])
def test_lists_over_several_chunks(kind):
    """The cut lies in bins of many and of few keys; ties at it go to the lowest positions, in whichever chunk these are."""
    pytest.importorskip("triton")
    device, length = "cuda" if torch.cuda.is_available() else "cpu", 5000
    weights = {
        "spread": torch.rand(BATCH, 2, 2, length).exp() / length,
        "equal": torch.full((BATCH, 2, 2, length), 1e-4),
        "two values": torch.where(torch.rand(BATCH, 2, 2, length) < 0.3, 1e-3, 1e-5),
        "one bin": 1e-3 * (1 + 1e-3 * torch.rand(BATCH, 2, 2, length)),
        "tiny": 1e-12 * torch.rand(BATCH, 2, 2, length),
    }[kind][:, :, :1].expand(-1, -1, 2, -1)
    scores, lse = weights.log().to(device), torch.zeros(BATCH, 2, 3, device=device)
    begin = torch.tensor([4990, 2049, 1], dtype=torch.int32, device=device)
    for lists, keys, share in ((2, 64, 0.07), (1, 700, 0.0), (2, 0, 0.9)):
        _, counts, indices = same_lists(scores, lse, begin, lists, 4800, keys, share)
        assert counts[0].tolist() == [max(keys, -(-int(4990 * int(share * 2**30)) // 2**30))] * lists
        if kind == "equal":
            assert indices[0, 0, : counts[0, 0]].tolist() == list(range(int(counts[0, 0])))


@pytest.mark.parametrize("run", [tsa.crop_list, crop_list_reference, crop_list], ids=["operator", "reference", "triton"])
def test_a_crop_behind_the_scored_rows_drops_a_list(run):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    since, counts, indices = (x.to(device) for x in lists())
    begin, k = torch.zeros_like(since), torch.zeros(BATCH, KV_HEADS, LENGTH, DIM, device=device)
    run(since, begin, counts, indices, k, torch.tensor([9, 7, 6], dtype=torch.int32, device=device))
    assert begin.tolist() == [9, 7, 6]
    assert since.tolist() == [7, 7, 0]
    assert counts.tolist() == [[3, 3], [3, 3], [0, 0]]


def listed_case(dtype=torch.float32):
    """A draft step: lists of 20, 3 and no keys before rows 50, 30 and 0; lengths 61, 30 and 12; 5 rows of padding."""
    q, k, v = (torch.randn(BATCH, h, n, DIM, dtype=dtype) for h, n in ((HEADS, 1), (KV_HEADS, LENGTH), (KV_HEADS, LENGTH)))
    since, lengths = torch.tensor([50, 30, 0], dtype=torch.int32), torch.tensor([61, 30, 12], dtype=torch.int32)
    counts = torch.tensor([20, 3, 0], dtype=torch.int32)[:, None].repeat(1, KV_HEADS)
    indices = torch.full((BATCH, KV_HEADS, 24), 1 << 20, dtype=torch.int32)  # behind the count: anything
    for b, first in ((0, 5), (1, 0)):
        for g in range(KV_HEADS):
            n, end = int(counts[b, g]), int(since[b])
            indices[b, g, :n] = (first + torch.randperm(end - first)[:n]).sort().values.int()
    key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    key_mask[0, :5] = False
    return q, k, v, indices, counts, since, lengths, key_mask


def test_one_list_for_all_heads():
    """The lists and the attention of one that each KV head has a copy of."""
    q, k, v, indices, counts, since, lengths, key_mask = listed_case()
    indices, counts = indices[:, :1].contiguous(), counts[:, :1].contiguous()
    given = (since, None, lengths, key_mask, 0.3)
    want = tsa.listed_attention(q, k, v, indices.repeat(1, KV_HEADS, 1), counts.repeat(1, KV_HEADS), *given)
    for got in (tsa.listed_attention(q, k, v, indices, counts, *given), listed_attention(q, k, v, indices, counts, *given)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    scores, lse, begin, _ = verify_step(4)
    one = empty_lists(1, 40)
    tsa.list_keys(*one, scores, lse, begin, 9, 0.0)
    mean = ranks(scores, lse, begin, KV_HEADS).mean(1, keepdim=True)
    for b, n in enumerate(one[1][:, 0].tolist()):
        assert one[2][b, 0, :n].tolist() == sorted(mean[b, 0].topk(n).indices.tolist())


@pytest.mark.parametrize("given", ["lengths", "key_mask", "start", "sinks", "mask"])
def test_attention_reads_the_list_and_all_since(given):
    q, k, v, indices, counts, since, lengths, key_mask = listed_case(torch.float64)
    start = torch.tensor([5, 0, 4], dtype=torch.int32) if given == "start" else None
    more = {
        "sinks": torch.randn(HEADS, dtype=torch.float64) if given == "sinks" else None,
        "mask": torch.randn(BATCH, 1, 1, LENGTH, dtype=torch.float64) if given == "mask" else None,
    }
    lengths = lengths if start is None else lengths - start
    out, lse = tsa.listed_attention(q, k, v, indices, counts, since, start, lengths, key_mask, 0.3, **more)
    for b in range(BATCH):
        end = int(lengths[b]) + (0 if start is None else int(start[b]))
        for h in range(HEADS):
            g = h // 3
            first = max(int(since[b]), 0 if start is None else int(start[b]))
            read = [*indices[b, g, : counts[b, g]].tolist(), *range(first, end)]
            logits = 0.3 * k[b, g, read] @ q[b, h, 0]
            if more["mask"] is not None:
                logits = logits + more["mask"][b, 0, 0, read]
            values = v[b, g, read]
            if more["sinks"] is not None:
                logits, values = torch.cat([logits, more["sinks"][h : h + 1]]), torch.cat([values, values[:1] * 0])
            torch.testing.assert_close(out[b, h, 0], torch.softmax(logits, 0) @ values)
            torch.testing.assert_close(lse[b, h, 0].double(), logits.logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_agree(dtype, masked):
    """Through views of a larger cache, as its layers give them; with a list that is empty, and one that is all there is."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, indices, counts, since, lengths, key_mask = (x.to(device) for x in listed_case())
    k, v = (torch.cat([x, x * torch.nan], 2)[:, :, :LENGTH] for x in (k, v))
    mask = torch.randn(BATCH, 1, 1, LENGTH, device=device) if masked else None
    half = [x.to(dtype) for x in (q, k, v)]
    start = torch.tensor([6, 0, 3], dtype=torch.int32, device=device)
    for first, ends, sinks in (
        (None, lengths, None),
        (start, lengths - start, torch.randn(HEADS, device=device)),
        (None, None, None),
    ):
        out, lse = listed_attention(*half, indices, counts, since, first, ends, key_mask, 0.3, mask, sinks)
        exact = [x.double() for x in half]
        wide = [None if x is None else x.double() for x in (mask, sinks)]
        want, want_lse = listed_attention_reference(*exact, indices, counts, since, first, ends, key_mask, 0.3, *wide)
        assert float((out.double() - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 1.5e-3)
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)


def test_more_query_heads_than_a_tile_and_one_part(monkeypatch):
    """A group of 40 heads, and a cache that one program reads; a row that is short of its own list's end."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, k, v, indices, counts, since, lengths, key_mask = (x.to(device) for x in listed_case())
    q = torch.randn(BATCH, 40 * KV_HEADS, 1, DIM, device=device)
    monkeypatch.setattr(listed_host, "split_count", lambda *sizes: 1)
    monkeypatch.setattr(config, "QUERY_BYTES", 16 * DIM * 4)
    sinks = torch.randn(40 * KV_HEADS, device=device)
    out, lse = listed_attention(q, k, v, indices, counts, since, None, lengths, key_mask, 0.3, None, sinks)
    exact = (q.double(), k.double(), v.double(), indices, counts, since, None, lengths, key_mask, 0.3, None, sinks.double())
    want, want_lse = listed_attention_reference(*exact)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    on = lambda *xs: tuple(x.to(device) for x in xs)  # noqa: E731
    scores, lse, begin, (_, k, _) = verify_step(4, torch.float32)
    kinds = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(tsa.list_keys.default, (*on(*lists(), scores, lse, begin), 6, 0.2), test_utils=kinds)
    since, counts, indices = lists()
    torch.library.opcheck(tsa.crop_list.default, on(since, begin, counts, indices, k, begin + 1), test_utils=kinds)
    q, k, v, indices, counts, since, lengths, key_mask = on(*listed_case())
    given = (q, k, v, indices, counts, since, None, lengths, key_mask, 0.3)
    torch.library.opcheck(tsa.listed_attention.default, given)


def test_bad_arguments_are_named():
    q, k, v, indices, counts, since, lengths, key_mask = listed_case()
    scores, lse, begin, _ = verify_step(4)
    with pytest.raises(ValueError, match="listed_attention: q must have 1 row, got 2"):
        tsa.listed_attention(q.repeat(1, 1, 2, 1), k, v, indices, counts, since, None, lengths, key_mask, 0.3)
    with pytest.raises(ValueError, match="listed_attention: since must be contiguous int32"):
        tsa.listed_attention(q, k, v, indices, counts, since.long(), None, lengths, key_mask, 0.3)
    with pytest.raises(ValueError, match=r"list_keys: scores must be \[3, heads of 2 groups, 2, L\]"):
        tsa.list_keys(*lists(), scores[:, :, :0], lse, begin, 6, 0.2)
    with pytest.raises(ValueError, match="list_keys: lists of 71 keys, of 70"):
        tsa.list_keys(*lists(71), scores, lse, begin, 6, 0.2)
    with pytest.raises(ValueError, match="got 6 and 2"):
        tsa.list_keys(*lists(), scores, lse, begin, 6, 2.0)
    with pytest.raises(ValueError, match=r"crop_list: at must be int32 \(3,\)"):
        tsa.crop_list(since, begin, counts, indices, k, begin.long())
