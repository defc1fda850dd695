"""The projected keys of a cache layer, which page scores of a learned index read (`tsa::append_projected`)."""

from __future__ import annotations

import torch
from torch import nn

from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.cache.kv_state import Field, KvSize, KvState, PlacedState, Tensors
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa


class ProjectedKeys(PlacedState):
    """Each key before its rotation, projected for each list of an index; where its row stands; the real rows of each page.

    Args:
        index: of the layer's attention; None: a layer that is not known yet, see `of`.
    """

    def __init__(self, index: HeadIndex | None = None) -> None:
        self.index = index
        self.name = "projected_keys" if index is None else index.state_name

    def of(self, index: nn.Module | None) -> KvState | None:
        return ProjectedKeys(index) if isinstance(index, HeadIndex) else None

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        assert self.index is not None
        lists, width, _ = self.index.query.shape
        return (
            Field("index", (size.batch, lists, size.capacity, width), size.dtype, 1),
            Field("positions", (size.batch, 1, size.capacity), torch.int32, 1),
            Field("counts", (size.batch, 1, size.pages), torch.int32, 16),
        )

    def append(
        self,
        tensors: Tensors,
        keys: torch.Tensor,
        values: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        key_mask: torch.Tensor | None,
        new: int,
        positions: torch.Tensor | None = None,
    ) -> None:
        assert self.index is not None
        x, begin, end = self.index, begin.to(torch.int32), end.to(torch.int32)
        kept = tensors["index"], tensors["positions"], tensors["counts"]
        placed = as_generated(begin, key_mask, new) if positions is None else positions
        weights = x.query, x.key, x.frequencies
        torch.ops.tsa.append_projected.default(
            *kept, *weights, keys, placed, begin, end, key_mask, new, x.owners, x.interleaved, x.factor
        )


def as_generated(begin: torch.Tensor, key_mask: torch.Tensor | None, new: int) -> torch.Tensor:
    """int `[B, new]`: where rows from `begin` on stand if nothing else is known: behind as many as are real before them, as
    `generate()` of transformers counts."""
    rows = begin.long()[:, None] + torch.arange(new, device=begin.device)
    if key_mask is None or new == 0:
        return rows
    rank = (key_mask.long().cumsum(1) - 1).clamp_min(0)
    return rank.gather(1, rows.clamp(max=rank.shape[1] - 1))
