"""Projected keys on the GPU: the launch of device.py. The contract is docs/operators.md, `append_projected`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.launch import constant
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import precision

Tensor = torch.Tensor


def append_projected(
    index: Tensor,
    positions: Tensor,
    counts: Tensor,
    query: Tensor,
    key: Tensor,
    frequencies: Tensor,
    k: Tensor,
    placed: Tensor,
    begin: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    new: int,
    heads: Sequence[int],
    interleaved: bool,
    factor: float,
) -> None:
    """`tsa::append_projected` by Triton. Nothing waits for the device; no number of rows compiles anything."""
    from tsa_compile.kernels.state.append_projected.device import append_projected_kernel

    batch, lists, _, width = index.shape
    if index.numel() == 0:
        return
    dim, rows = k.shape[3], rows_at_once(k)
    of_lists = constant(tuple(heads), torch.int32, k.device)
    numbers = (
        *k.stride(), *index.stride()[:2], positions.stride(0), counts.stride(0),
        0 if placed.shape[0] == 1 else placed.stride(0),
        *((0, 0) if key_mask is None else key_mask.stride()), lists, factor,
    )  # fmt: skip
    launch(
        append_projected_kernel, (batch * lists, cdiv(new, rows) + 1),
        (index, positions, counts, key, frequencies, k, placed, begin, end, key_mask, of_lists), numbers,
        D=dim, R=width, BLOCK_D=max(16, next_power_of_2(dim)), BLOCK_R=max(16, next_power_of_2(width)),
        PAIRS=frequencies.shape[0], INTERLEAVED=interleaved, ROWS=rows, PRECISION=precision(k.dtype), num_warps=4,
    )  # fmt: skip


def rows_at_once(k: Tensor) -> int:
    """Rows of the cache that one program takes: whole pages."""
    return 64 if k.shape[3] * k.element_size() <= 512 else 32
