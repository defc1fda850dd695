"""The teams of a cache's pages, which sampled teams are drawn from (`tsa::append_teams`)."""

from __future__ import annotations

import torch

from tsa_compile.cache.kv_state import PAGE, Field, KvSize, KvState, Tensors
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa


class PageTeams(KvState):
    """Which rows of each page are alike, in 64 bits (`kernels/common/teams.py`).

    Args:
        count: representatives of a page, 1 to 4.
    """

    def __init__(self, count: int) -> None:
        self.name = f"page_teams {count}"
        self.count = count

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        return (Field("teams", (size.batch, size.kv_heads, size.pages), torch.int64, PAGE),)

    def append(
        self,
        tensors: Tensors,
        keys: torch.Tensor,
        values: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        key_mask: torch.Tensor | None,
        new: int,
    ) -> None:
        torch.ops.tsa.append_teams.default(tensors["teams"], keys, None, 1, None, begin, end, key_mask, new, self.count)
