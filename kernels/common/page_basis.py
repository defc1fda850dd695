"""A page's keys by their mean and a few directions: how that is stored, and how it is read back. LOCKS (arXiv 2607.24555).

A page of 16 keys `k_i` is `mean + sum_r scale_r * c_ri * b_r`: directions `b_r` of whole numbers from -7 to 7 (4 bits each),
coordinates `c_ri` from -127 to 127. A key that is padding has the coordinate -128 in all directions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.kernels.common.pages import PAGE, pages_of

Tensor = torch.Tensor
RANK = 8  # directions
TOP, MOST = 7, 127  # largest numbers of directions and coordinates
HIDDEN = -128  # coordinate of padding
OFFSET = 8  # of a direction's number in its 4 bits


class PageBasis(NamedTuple):
    """Of all pages of a cache.

    Args:
        basis: uint8 `[N, Hk, P, RANK, D / 2]`: number `j` of a direction in the low 4 bits of byte `j`, `j + D / 2` in the high.
        coords: int8 `[N, Hk, P, RANK, 16]`.
        scales: bfloat16 `[N, Hk, P, RANK]`, 0: a direction that is not there.
    """

    basis: Tensor
    coords: Tensor
    scales: Tensor


def basis_shapes(kv_heads: int, pages: int, dim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shapes of a `PageBasis` behind its first dimension."""
    pages_of_heads = (kv_heads, pages, RANK)
    return (*pages_of_heads, dim // 2), (*pages_of_heads, PAGE), pages_of_heads


BASIS_DTYPES = (torch.uint8, torch.int8, torch.bfloat16)


def empty_basis(k: Tensor) -> PageBasis:
    """Of keys `[N, Hk, L, D]`, uninitialised."""
    shapes = basis_shapes(k.shape[1], pages_of(k.shape[2]), k.shape[3])
    return PageBasis(*(k.new_empty(k.shape[0], *s, dtype=d) for s, d in zip(shapes, BASIS_DTYPES, strict=True)))


def pack(numbers: Tensor) -> Tensor:
    """Whole numbers from -7 to 7 `[..., D]` -> uint8 `[..., D / 2]`."""
    low, high = (numbers + OFFSET).to(torch.uint8).chunk(2, -1)
    return low | (high << 4)


def unpack(basis: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat((basis & 15, basis >> 4), -1).to(dtype) - OFFSET
