"""What one attention reads whatever the data are: what `tsa.reach` and the warning of a plan's hole are made from. A leaf."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

ALL_KEYS = 1 << 62  # the width of a window without an end


class Edges(NamedTuple):
    """What one attention reads whatever the data: its guaranteed edges, periodic in the position of the row.

    Args:
        period: rows at `t` and `t + period` read at the same distances.
        spans: for each phase `t % period`, runs `(first, last)` of distances `t - s` that the row at `t` reads, both included. A
            distance beyond the start of the sequence reads nothing. The row itself (distance 0) always counts: models add it.
    """

    period: int
    spans: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def none(cls) -> Edges:
        """A data-dependent selection: it may be empty."""
        return cls(1, ((),))

    @classmethod
    def window(cls, width: int) -> Edges:
        """The row's own and preceding tokens, `width` in all."""
        return cls(1, (((0, width - 1),),))

    @classmethod
    def every(cls) -> Edges:
        """Dense causal attention."""
        return cls.window(ALL_KEYS)

    @classmethod
    def blocks(cls, block: int, offset: int = 0) -> Edges:
        """Fixed blocks, the first of `offset` tokens (0: of `block`): a row reads its block up to itself."""
        return cls(block, tuple(((0, (r - offset) % block),) for r in range(block)))

    @classmethod
    def bridges(cls, block: int, rows: int, sources: int, offset: int = 0) -> Edges:
        """Fixed blocks, and for the first `rows` rows of each block the last `sources` tokens before it."""
        places = ((r - offset) % block for r in range(block))
        return cls(block, tuple(((0, i + (sources if i < rows else 0)),) for i in places))

    def mask(self, length: int) -> torch.Tensor:
        """bool `[length, length]`: true where the row reads the key, or is its own."""
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = distance == 0
        for r, runs in enumerate(self.spans[:length]):
            for first, last in runs:
                mask[r :: self.period] |= (distance[r :: self.period] >= first) & (distance[r :: self.period] <= last)
        return mask & (distance >= 0)

    def union(self, other: Edges) -> Edges:
        """Both kinds of edges."""
        period = math.lcm(self.period, other.period)
        spans = (self.spans[r % self.period] + other.spans[r % other.period] for r in range(period))
        return Edges(period, tuple(spans))
