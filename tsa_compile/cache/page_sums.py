"""The plain reference of derived state."""

from __future__ import annotations

import torch

from tsa_compile.cache.kv_state import PAGE, Field, KvSize, KvState, Tensors


class PageSums(KvState):
    """The sum of each page's keys, and how many of its rows are no padding."""

    name = "page_sums"

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        shape = (size.batch, size.kv_heads, size.pages)
        return (
            Field("sums", (*shape, size.head_dim), torch.float32, PAGE),
            Field("counts", (size.batch, 1, size.pages), torch.int32, PAGE),
        )

    def append(
        self,
        tensors: Tensors,
        keys: torch.Tensor,
        values: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        key_mask: torch.Tensor | None,
    ) -> None:
        capacity = keys.shape[2]
        pages = capacity // PAGE
        row = torch.arange(capacity, device=keys.device)
        weight = row < end[:, None]
        if key_mask is not None:
            known = min(capacity, key_mask.shape[1])
            weight[:, :known] &= key_mask[:, :known].bool()
        weighed = torch.where(weight[:, None, :, None], keys.float(), 0.0)
        sums = weighed[:, :, : pages * PAGE].unflatten(2, (pages, PAGE)).sum(3)
        counts = weight[:, : pages * PAGE].unflatten(1, (pages, PAGE)).sum(2, dtype=torch.int32)
        page = torch.arange(pages, device=keys.device)
        filled = (page >= begin[:, None] // PAGE) & (page < end[:, None] // PAGE)
        old_sums, old_counts = tensors["sums"][:, :, :pages], tensors["counts"][:, :, :pages]
        old_sums.copy_(torch.where(filled[:, None, :, None], sums, old_sums))
        old_counts.copy_(torch.where(filled[:, None], counts[:, None], old_counts))
