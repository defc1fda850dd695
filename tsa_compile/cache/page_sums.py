"""The sums of a cache's pages, which page scores read (`tsa::append_pages`)."""

from __future__ import annotations

import torch

from tsa_compile.cache.kv_state import PAGE, Field, KvSize, KvState, Tensors
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa


class PageSums(KvState):
    """The sum of each page's keys, and how many of its rows are no padding."""

    name = "page_sums"

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        shape = (size.batch, size.kv_heads, size.pages)
        dtype = torch.bfloat16 if size.dtype == torch.bfloat16 else torch.float32  # 16 float16 keys may pass its range
        return (
            Field("sums", (*shape, size.head_dim), dtype, PAGE),
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
        new: int,
    ) -> None:
        begin, end = begin.to(torch.int32), end.to(torch.int32)
        index = tensors["sums"], tensors["counts"]
        torch.ops.tsa.append_pages.default(*index, keys, None, 1, None, begin, end, key_mask, new)
