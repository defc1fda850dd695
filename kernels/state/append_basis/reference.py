"""The bases of a cache's pages as rows are appended, in plain PyTorch. The contract is docs/operators.md, `append_basis`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.common.filled_pages import entries, every_row, filled_pages, real_rows
from tsa_compile.kernels.common.page_basis import HIDDEN, MOST, RANK, TOP, PageBasis, empty_basis, pack
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.view import capacity_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
STEPS = 2  # pairs of power steps that find a direction


def append_basis_reference(
    basis: Tensor,
    coords: Tensor,
    scales: Tensor,
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    begin: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    new: int,
) -> None:
    """`tsa::append_basis` on any device; it looks which pages are full, so it synchronises with the device."""
    view = KvView(blocks, block, None, None)
    pages = capacity_of(k, view) // PAGE
    b, page, owner, place = entries(filled_pages(begin, end, pages), view, k.shape[2] // PAGE)
    real = real_rows(end, start, key_mask, pages)[b, page]  # [n, 16]
    inside = place[:, None] * PAGE + torch.arange(PAGE, device=k.device)
    rows = k[owner[:, None], :, inside].transpose(1, 2)  # [n, Hk, 16, D]
    found = low_rank(rows, real[:, None].expand(rows.shape[:3]))
    for to, x in zip((basis, coords, scales), found, strict=True):
        to[owner, :, place] = x


def low_rank(rows: Tensor, real: Tensor) -> PageBasis:
    """Directions and coordinates of pages `[..., 16, D]`, one after the other, each of what those before it left over.

    A direction is the largest one of what is left, by power steps on its Gram matrix. It is rounded, then the coordinates along
    the rounded direction are, so later directions make good what rounding lost. Keys count from the mean that
    `tsa::append_pages` keeps, rounded as it is there.

    Args:
        real: bool `[..., 16]`, false: padding.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    left = torch.where(real[..., None], rows.to(dtype), 0)
    total = left.sum(-2, keepdim=True)
    if rows.dtype == torch.bfloat16:
        total = total.bfloat16().to(dtype)
    left = torch.where(real[..., None], left - total / real.sum(-1)[..., None, None].clamp_min(1), 0)
    gram = left @ left.mT
    parts = []
    for _ in range(RANK):
        direction = _largest(gram, left)
        numbers = rounded(direction / _not_zero(direction.abs().amax(-1, keepdim=True)) * TOP)
        square = numbers.square().sum(-1, keepdim=True)
        along = (left @ numbers[..., None])[..., 0]  # [..., 16]
        wanted = along / _not_zero(square)
        scale = (wanted.abs().amax(-1, keepdim=True) / MOST).bfloat16().to(dtype)
        coords = rounded(wanted / _not_zero(scale)).clamp(-MOST, MOST)
        left = left - scale[..., None] * coords[..., None] * numbers[..., None, :]
        cross = along[..., None] * coords[..., None, :]
        gram = gram - scale[..., None] * (cross + cross.mT)
        gram = gram + (scale * scale * square)[..., None] * coords[..., None] * coords[..., None, :]
        parts.append((pack(numbers), torch.where(real, coords, HIDDEN).to(torch.int8), scale[..., 0].bfloat16()))
    basis, coords_of, scales = zip(*parts, strict=True)
    return PageBasis(torch.stack(basis, -2), torch.stack(coords_of, -2), torch.stack(scales, -1))


def _largest(gram: Tensor, left: Tensor) -> Tensor:
    """About the largest direction `[..., D]` of `left`, of any length."""
    most = gram.diagonal(dim1=-2, dim2=-1).argmax(-1)
    v = gram.gather(-1, most[..., None, None].expand(*gram.shape[:-1], 1))
    for _ in range(STEPS):
        v = gram @ (v / _not_zero(v.abs().amax(-2, keepdim=True)))
        v = gram @ (v / _not_zero(v.abs().amax(-2, keepdim=True)))
    v = v / _not_zero(v.abs().amax(-2, keepdim=True))
    return (left.mT @ v)[..., 0]


def rounded(x: Tensor) -> Tensor:
    """To whole numbers, halves up."""
    return (x + 0.5).floor()


def _not_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


def page_basis_reference(
    k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::page_basis`: those of a whole cache, computed anew."""
    return build(append_basis_reference, k, KvView(blocks, block, start, lengths), key_mask)


def build(append: Callable[..., None], k: Tensor, view: KvView, key_mask: Tensor | None) -> PageBasis:
    """Of all pages that are full, by an `append_basis` from nothing."""
    found = empty_basis(k)
    begin, end, capacity = every_row(k, view)
    append(*found, k, view.blocks, view.block, view.start, begin, end, key_mask, capacity)
    return found
