"""What was kept, and the attention among it, as the lowered operators pass them on."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from tsa_compile.export.torch_tensorrt_lowering.rows import Rows, Size, look_up

Tensor = torch.Tensor


def kept_size(counts: Tensor, capacity: Size) -> Size:
    """The largest count, at least 1, as a size."""
    size = cast(int, counts.long().amax().clamp(min=1).item())  # a symbol, where shapes are
    torch._check(size >= 1)
    torch._check(size <= capacity)
    return size


def for_heads(lists: Tensor, heads: Size) -> Tensor:
    """Lists `[B, G, n]` -> `[B, H, n]`: each head's own or its group's."""
    if lists.shape[1] == heads:
        return lists
    return lists.index_select(1, torch.arange(heads, device=lists.device) * lists.shape[1] // heads)


class Kept(NamedTuple):
    """Kept tokens in ranks.

    slots: int64 `[B, H, Lk]`, place of each token in its head's list, -1 if it is not kept.
    tokens: int64 `[B, H, size]`, the lists, ascending; 0 behind a row's count.
    """

    slots: Tensor
    tokens: Tensor
    size: Size

    @classmethod
    def of(cls, rows: Rows, ranks: Tensor | None, indices: Tensor, counts: Tensor) -> Kept:
        """From the results of `select_tokens`."""
        size = kept_size(counts, rows.k_len)
        place = torch.arange(size, device=indices.device)
        listed = cls.ranks_of(rows, ranks, for_heads(indices, rows.heads).index_select(2, place))
        spare = torch.where(listed >= 0, listed, rows.k_len)
        base = torch.full((rows.batch, rows.heads, rows.k_len + 1), -1, dtype=torch.int64, device=indices.device)
        slots = base.scatter(2, spare, place + torch.zeros_like(spare))[:, :, : rows.k_len]
        return cls(slots, listed.clamp(min=0), size)

    @staticmethod
    def ranks_of(rows: Rows, ranks: Tensor | None, positions: Tensor) -> Tensor:
        """Ranks of positions int32 `[B, H, n]`; -1 stays."""
        positions = positions.long()
        if ranks is None:
            return positions
        found = look_up(ranks.long()[:, None], positions.clamp(min=0)[:, None])[:, 0] - 1
        return torch.where(positions >= 0, found, -1)


class Attended(NamedTuple):
    """Attention of the kept queries: row t of head h is its (first + t)-th kept token.

    first: int64 `[B, H, 1]`, kept tokens before the first query.
    out: `[B, H, rows, Dv]`, normalised. lse: float32 `[B, H, rows, 1]`, or None: nobody needs it.
    """

    first: Tensor
    out: Tensor
    lse: Tensor | None

    def row_of(self, rows: Rows, kept: Kept, rank: Tensor) -> tuple[Tensor, Tensor]:
        """For queries at rank `[b, ...]`: is it kept (bool `[B, H, ..., 1]`), and its row in `out` (`[B, H, ...]`, clipped)."""
        slot = look_up(kept.slots, rows.clip(rank)[:, None])
        last = torch.arange(self.out.shape[2], device=slot.device)[-1:]
        row = slot - (self.first if slot.dim() == 3 else self.first[..., None])
        return (slot >= 0)[..., None], row.clamp(min=0).minimum(last)
