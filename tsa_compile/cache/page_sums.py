"""What page selection keeps of a cache's pages: sums of keys and values (`tsa::append_pages`), bases (`tsa::append_basis`)."""

from __future__ import annotations

import torch

from tsa_compile.cache.kv_state import PAGE, Field, KvSize, KvState, Tensors
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.common.page_basis import BASIS_DTYPES, PageBasis, basis_shapes

Tensor = torch.Tensor


class PageSums(KvState):
    """The sum of each page's keys, and how many of its rows are no padding."""

    name = "page_sums"

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        return _sums(size, size.head_dim, size.dtype)

    def append(
        self, tensors: Tensors, keys: Tensor, values: Tensor, begin: Tensor, end: Tensor, key_mask: Tensor | None, new: int
    ) -> None:
        _append_sums(tensors, keys, begin, end, key_mask, new)


class ValueSums(KvState):
    """The sum of each page's values: what stands for a page that is not read."""

    name = "value_sums"

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        return _sums(size, size.v_head_dim, size.v_dtype)

    def append(
        self, tensors: Tensors, keys: Tensor, values: Tensor, begin: Tensor, end: Tensor, key_mask: Tensor | None, new: int
    ) -> None:
        _append_sums(tensors, values, begin, end, key_mask, new)


class PageBases(KvState):
    """A few directions of each page's keys, beside their sum."""

    name = "page_bases"

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        shapes = basis_shapes(size.kv_heads, size.pages, size.head_dim)
        named = zip(PageBasis._fields, shapes, BASIS_DTYPES, strict=True)
        return tuple(Field(name, (size.batch, *shape), dtype, PAGE) for name, shape, dtype in named)

    def append(
        self, tensors: Tensors, keys: Tensor, values: Tensor, begin: Tensor, end: Tensor, key_mask: Tensor | None, new: int
    ) -> None:
        basis = (tensors[name] for name in PageBasis._fields)
        torch.ops.tsa.append_basis.default(*basis, keys, None, 1, None, begin, end, key_mask, new)


def _sums(size: KvSize, dim: int, dtype: torch.dtype) -> tuple[Field, ...]:
    shape = (size.batch, size.kv_heads, size.pages)
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # 16 float16 numbers may pass its range
    return Field("sums", (*shape, dim), wide, PAGE), Field("counts", (size.batch, 1, size.pages), torch.int32, PAGE)


def _append_sums(tensors: Tensors, rows: Tensor, begin: Tensor, end: Tensor, key_mask: Tensor | None, new: int) -> None:
    index = tensors["sums"], tensors["counts"]
    torch.ops.tsa.append_pages.default(*index, rows, None, 1, None, begin, end, key_mask, new)
