"""Checks of the operators on the bases of a cache's pages, and on completion. They read shapes and dtypes only."""

from __future__ import annotations

import torch

from tsa_compile.kernels import page_checks
from tsa_compile.kernels.common.page_basis import BASIS_DTYPES, PageBasis, basis_shapes
from tsa_compile.kernels.common.pages import pages_of
from tsa_compile.kernels.decode_checks import MAX_ROWS
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def append_basis(
    basis: Tensor, coords: Tensor, scales: Tensor, k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    begin: Tensor, end: Tensor, key_mask: Tensor | None, new: int,
) -> None:  # fmt: skip
    name = "tsa::append_basis"
    page_checks.check_append(name, k, KvView(blocks, block, start, end), begin, key_mask, new)
    _check_dim(name, k.shape[3])
    _check_basis(name, PageBasis(basis, coords, scales), k.shape[1], k.shape[3])
    if basis.shape[0] != k.shape[0] or basis.shape[2] < k.shape[2] // page_checks.PAGE:
        raise ValueError(f"{name}: basis {tuple(basis.shape)} does not fit keys {tuple(k.shape)}")


def page_basis(
    k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None
) -> None:
    page_checks.page_sums(k, blocks, block, start, lengths, key_mask, name="tsa::page_basis")
    _check_dim("tsa::page_basis", k.shape[3])


def refine_scores(
    q: Tensor, logits: Tensor, counts: Tensor, basis: Tensor, coords: Tensor, scales: Tensor, indices: Tensor | None,
    list_counts: Tensor | None, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, capacity: int,
    scale: float,
) -> None:  # fmt: skip
    name, view = "tsa::refine_scores", KvView(blocks, block, start, lengths)
    if q.dim() != 4 or not 1 <= q.shape[2] <= MAX_ROWS or basis.dim() != 5 or q.shape[1] % basis.shape[1]:
        raise ValueError(f"{name}: q {tuple(q.shape)} does not fit basis {tuple(basis.shape)}: [B, H, 1 to {MAX_ROWS}, D]")
    _check_dim(name, q.shape[3])
    _check_basis(name, PageBasis(basis, coords, scales), basis.shape[1], q.shape[3])
    _check_logits(name, logits, tuple(q.shape[:3]), capacity)
    page_checks.check_index(name, None, counts, view, capacity)
    page_checks.check_table(name, q, view)
    if basis.shape[0] != counts.shape[0] or basis.shape[2] != counts.shape[2]:
        raise ValueError(f"{name}: basis {tuple(basis.shape)} and counts {tuple(counts.shape)} differ in pages")
    if (indices is None) != (list_counts is None):
        raise ValueError(f"{name}: indices and list_counts must both be given, or neither")
    if indices is not None and list_counts is not None:
        _check_lists(name, indices, list_counts, (q.shape[0], basis.shape[1]))


def complete_pages(
    out: Tensor, lse: Tensor, logits: Tensor, sums: Tensor, counts: Tensor, indices: Tensor, list_counts: Tensor,
    blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, capacity: int,
) -> None:  # fmt: skip
    name, view = "tsa::complete_pages", KvView(blocks, block, start, lengths)
    if out.dim() != 4 or not 1 <= out.shape[2] <= MAX_ROWS or out.stride(3) != 1:
        raise ValueError(f"{name}: out must be [B, H, 1 to {MAX_ROWS}, Dv], rows contiguous, got {tuple(out.shape)}")
    if lse.dtype != torch.float32 or tuple(lse.shape) != tuple(out.shape[:3]) or not lse.is_contiguous():
        raise ValueError(f"{name}: lse must be contiguous float32 {tuple(out.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}")
    page_checks.check_index(name, sums, counts, view, capacity)
    if out.shape[1] % sums.shape[1] or out.shape[3] != sums.shape[3]:
        raise ValueError(f"{name}: out {tuple(out.shape)} does not fit sums {tuple(sums.shape)}")
    _check_logits(name, logits, tuple(out.shape[:3]), capacity)
    page_checks.check_table(name, out, view)
    _check_lists(name, indices, list_counts, (out.shape[0], sums.shape[1]))


def _check_dim(name: str, dim: int) -> None:
    if dim % 2:
        raise ValueError(f"{name}: the head dim must be even, as its halves are packed together, got {dim}")


def _check_basis(name: str, given: PageBasis, kv_heads: int, dim: int) -> None:
    shapes = basis_shapes(kv_heads, given.basis.shape[2], dim)
    for label, x, shape, dtype in zip(PageBasis._fields, given, shapes, BASIS_DTYPES, strict=True):
        if x.dtype != dtype or tuple(x.shape) != (given.basis.shape[0], *shape) or not x[:1, :1].is_contiguous():
            raise ValueError(
                f"{name}: {label} must be {dtype} {('N', *shape)}, pages contiguous, got {x.dtype} {tuple(x.shape)}, {x.stride()}"
            )


def _check_logits(name: str, logits: Tensor, rows: tuple[int, ...], capacity: int) -> None:
    wanted = (*rows, pages_of(capacity))
    if logits.dtype != torch.float32 or tuple(logits.shape) != wanted or not logits.is_contiguous():
        raise ValueError(f"{name}: logits must be contiguous float32 {wanted}, got {logits.dtype} {tuple(logits.shape)}")


def _check_lists(name: str, indices: Tensor, counts: Tensor, lists: tuple[int, int]) -> None:
    if indices.dtype != torch.int32 or indices.dim() != 3 or tuple(indices.shape[:2]) != lists or not indices.is_contiguous():
        raise ValueError(f"{name}: indices must be contiguous int32 {(*lists, 'N')}, got {indices.dtype} {tuple(indices.shape)}")
    if counts.dtype != torch.int32 or tuple(counts.shape) != lists or not counts.is_contiguous():
        raise ValueError(f"{name}: list counts must be contiguous int32 {lists}, got {counts.dtype} {tuple(counts.shape)}")
