"""Attention to keys that are spread over a process group: holders attend to what they hold, and partial results are merged.

"Move the Query, Not the Cache" (arXiv 2606.01502): a partial result is `(out, lse)`, and joining them is exact. They are joined
in a tree that depends on the ranks alone: the result is the same on every rank, whatever the order in which messages arrive.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import torch

from tsa_compile.kernels.common.group import check_agreement, gather, rank_and_size, scatter
from tsa_compile.kernels.common.pages import PAGE, pages_of
from tsa_compile.kernels.common.results import empty_result
from tsa_compile.kernels.types import Attended

Tensor = torch.Tensor
Corpus = Callable[[Tensor], tuple[Tensor, Tensor] | None]
_corpus: contextvars.ContextVar[Corpus | None] = contextvars.ContextVar("_corpus", default=None)
_at_hand: contextvars.ContextVar[bool] = contextvars.ContextVar("_at_hand", default=False)


@contextlib.contextmanager
def sharing(corpus: Corpus) -> Iterator[None]:
    """Inside, calls of `tsa::routed_attention` whose keys `corpus` knows also attend to the keys and values `[1, Hk, n, D]` that
    it gives: this rank's of a corpus that the ranks hold together. The keys of the call are then those of its own queries."""
    token = _corpus.set(corpus)
    try:
        yield
    finally:
        _corpus.reset(token)


@contextlib.contextmanager
def at_hand() -> Iterator[None]:
    """Inside, calls of `tsa::routed_attention` have every key here, and exchange nothing; a recording keeps what it recorded."""
    token = _at_hand.set(True)
    try:
        yield
    finally:
        _at_hand.reset(token)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    travel: bool,
    group: str,
) -> tuple[Tensor, Tensor]:
    """`tsa::routed_attention` on any device, by the operators for keys at hand and the group's own transport."""
    corpus, known = None, _corpus.get()
    if known is not None:
        corpus = known(k)
    if corpus is not None:
        if indices is not None or travel:
            raise ValueError("tsa::routed_attention: a corpus that requests share is read whole, by queries that did not travel")
        own = _attend(q, k, v, None, None, start, lengths, key_mask, scale)
        if _at_hand.get():
            keys, values = (x.expand(q.shape[0], -1, -1, -1) for x in corpus)
            return tuple(torch.ops.tsa.merge(*own, *_attend(q, keys, values, None, None, None, None, None, scale)))
        everyone = q.shape[0] * rank_and_size(group)[1]
        keys, values = (x.expand(everyone, -1, -1, -1) for x in corpus)
        part = routed_attention(q, keys, values, None, None, None, None, None, scale, True, group)
        return tuple(torch.ops.tsa.merge(*own, *part))
    if _at_hand.get():
        return tuple(_attend(q, k, v, indices, counts, start, lengths, key_mask, scale))
    facts = {"batch rows": q.shape[0], "heads": q.shape[1], "query rows": q.shape[2], "head dim": q.shape[3]}
    facts |= {"KV heads": k.shape[1], "value head dim": v.shape[3], "bytes of a number": q.element_size(), "travel": travel}
    check_agreement("tsa::routed_attention", facts, q.device, group)
    asked = gather(q, group).flatten(0, 1) if travel else q
    part = _attend(asked, k, v, indices, counts, start, lengths, key_mask, scale)
    if travel:
        ranks = rank_and_size(group)[1]
        parts = scatter(_packed(part, ranks), group)
    else:
        parts = gather(_packed(part, 1)[0], group)
    merged = merge_in_tree(_unpacked(parts, part, q.shape[0]))
    return empty_result(q, v).copy_(merged.out), merged.lse


def gather_rows(rows: Tensor, length: int, group: str) -> Tensor:
    """`tsa::gather_rows`: the first `length` rows `[B, Hk, length, D]` of a sequence, of which each rank has its own."""
    facts = {"batch rows": rows.shape[0], "KV heads": rows.shape[1], "head dim": rows.shape[3], "rows of the sequence": length}
    check_agreement("tsa::gather_rows", facts, rows.device, group)
    ranks = rank_and_size(group)[1]
    most = -(-pages_of(length) // ranks) * PAGE
    padded = rows.new_zeros(*rows.shape[:2], most, rows.shape[3])
    padded[:, :, : rows.shape[2]] = rows
    pages = gather(padded, group).unflatten(3, (-1, PAGE))  # [ranks, B, Hk, pages of a rank, 16, D]
    return pages.permute(1, 2, 3, 0, 4, 5).flatten(2, 4)[:, :, :length].contiguous()


def merge_in_tree(parts: list[Attended]) -> Attended:
    """The whole of partial results over disjoint keys: neighbours are joined, then these, until one is left."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [Attended(*torch.ops.tsa.merge(*a, *b)) for a, b in pairs] + (parts[-1:] if len(parts) % 2 else [])
    return parts[0]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> Attended:
    """To the keys at hand: every one of them lies before the queries, or is their own."""
    if k.shape[2] == 0:
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        return Attended(empty_result(q, v).zero_(), lse)
    view = (None, 1, start, lengths)
    if indices is None:
        return Attended(*torch.ops.tsa.decode_attention(q, k, v, *view, key_mask, scale, causal=False)[:2])
    return Attended(*torch.ops.tsa.page_attention(q, k, v, indices, counts, *view, key_mask, scale, causal=False))


def _packed(part: Attended, messages: int) -> Tensor:
    """uint8 `[messages, bytes]`: the batch rows in so many parts, each their lse, then their out."""
    both = [x.contiguous().view(messages, -1).view(torch.uint8) for x in (part.lse, part.out)]
    return torch.cat(both, 1)


def _unpacked(parts: Tensor, like: Attended, batch: int) -> list[Attended]:
    """What each rank sent of `batch` rows; out in float32, or float64."""
    shape = (batch, *like.lse.shape[1:])
    split = 4 * shape[0] * shape[1] * shape[2]
    found = []
    for message in parts:
        lse = message[:split].clone().view(torch.float32).view(shape)
        out = message[split:].clone().view(like.out.dtype).view(*shape, like.out.shape[3])
        found.append(Attended(out if out.dtype == torch.float64 else out.float(), lse))
    return found
