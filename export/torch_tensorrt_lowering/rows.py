"""Sizes, ranks and reads that the lowered operators share.

A *rank* counts the real tokens of a batch row, a *position* counts all; without padding they are the same. Selection and masks
work in ranks, only reads of q, k and v need positions. Sizes may be symbols, so nothing here asks a size for its value, and
no result broadcasts a dimension of which it is not known whether it is 1. `[b]` below means the batch, or 1 for all its rows.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Size: TypeAlias = int  # or a torch.SymInt, which PyTorch takes wherever it says int
HIDDEN = -1e30  # a score that takes no part; finite, so that a row without keys gives no NaN


def number(size: Size, device: torch.device) -> Tensor:
    """A size as int64 `[1, 1]`, at least 1."""
    return torch.arange(size, device=device).amax().reshape(1, 1) + 1


def take(x: Tensor, index: Tensor, heads: Size) -> Tensor:
    """Rows of x `[B, Hx, n, E]` for `heads` heads, a multiple of Hx. index: `[b, heads or 1, ...]` -> `[B, heads, ..., E]`."""
    batch, x_heads, n, width = x.shape
    head = torch.arange(heads, device=x.device) * x_heads // heads
    first = (torch.arange(batch, device=x.device)[:, None] * x_heads + head) * n
    return F.embedding(_leading(first, index.dim()) + index, x.reshape(-1, width))


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of table `[B, G, n]`. index: `[b, G or 1, ...]` -> `[B, G, ...]`."""
    return take(table[..., None], index, table.shape[1])[..., 0]


def _leading(x: Tensor, dims: int) -> Tensor:
    """x `[...]` -> `[..., 1, 1]` of so many dimensions."""
    return x[(..., *[None] * (dims - x.dim()))]


def compact(member: Tensor, values: Tensor, capacity: Size, heads: Size) -> Tensor:
    """The values at the members, in order, then -1: member bool `[B, G, n]`, values int64 `[b, 1, n]` -> `[B, G, capacity]`."""
    place = torch.where(member, running_sum(member) - 1, capacity)
    base = torch.full((member.shape[0], heads, capacity + 1), -1, dtype=torch.int64, device=member.device)
    values = values + torch.zeros_like(place)
    return base.scatter(2, place, values)[:, :, :capacity]


def running_sum(member: Tensor) -> Tensor:
    """How many members there are up to and with this one, along the last dimension; int64."""
    return member.long().cumsum(-1)


class Rows:
    """The batch rows of one call.

    Args:
        q: `[B, H, Lq, D]`, the last `Lq` of the positions.
        k: `[B, Hk, Lk, D]`.
        order, ranks: int32 `[B, Lk]` as `tsa::key_view` gives them, or None: no padding.

    Attributes:
        column: int64 `[Lk]`.
        length: int64 `[b, 1]`, real tokens.
        positions: int64 `[b, Lk]`, the position of each rank.
        first_query: int64 `[b, 1]`, rank of the row's first query.
        query_rank: int64 `[b, Lq]`, rank of each query position; any value at padding.
        real, real_query: bool `[B, Lk]` and `[B, Lq]`, or None: all are.
    """

    def __init__(self, q: Tensor, k: Tensor, order: Tensor | None, ranks: Tensor | None) -> None:
        self.batch, self.heads, self.q_len, self.dim = q.shape
        self.kv_heads, self.k_len = k.shape[1], k.shape[2]
        self.device = q.device
        self.offset = self.k_len - self.q_len
        self.column = torch.arange(self.k_len, device=q.device)
        self.real = self.real_query = None
        self.padded = order is not None and ranks is not None
        if order is None or ranks is None:
            self.length = number(self.k_len, q.device)
            self.positions = self.column[None]
            self.first_query = self.length - number(self.q_len, q.device)
            self.query_rank = self._of_queries(self.column[None])
            return
        self.length = ranks.long().amax(1, keepdim=True)
        self.positions = order.long()
        is_real = (self.column < self.length).long()
        self.real = torch.zeros_like(is_real).scatter(1, self.positions, is_real) > 0
        self.real_query = self._of_queries(self.real)
        self.first_query = self.length - self.real_query.long().sum(1, keepdim=True)
        self.query_rank = self._of_queries(ranks.long() - 1)

    def _of_queries(self, x: Tensor) -> Tensor:
        """`[b, Lk]` -> `[b, Lq]`, the last ones."""
        if self.all_queries:
            return x
        return x.index_select(1, torch.arange(self.q_len, device=x.device) + self.offset)

    @property
    def all_queries(self) -> bool:
        """Whether it is known that every position has its query."""
        return isinstance(self.offset, int) and self.offset == 0

    def clip(self, rank: Tensor) -> Tensor:
        """The nearest rank in [0, Lk)."""
        return rank.clamp(min=0).minimum(self.column[-1:])

    def position(self, rank: Tensor) -> Tensor:
        """Positions of these ranks, clipped to the row. rank: int64 `[b, ...]`; the result is alike."""
        rank = self.clip(rank)
        if not self.padded:
            return rank
        at = rank + _leading(torch.arange(self.batch, device=self.device) * self.k_len, rank.dim())
        return F.embedding(at, self.positions.reshape(-1, 1))[..., 0]

    def query_rows(self, q: Tensor, rank: Tensor) -> Tensor:
        """Queries at these ranks, any row where there is none. rank: int64 `[b, H or 1, ...]` -> `[B, H, ..., D]`."""
        return take(q, (self.position(rank) - self.offset).clamp(min=0), self.heads)
