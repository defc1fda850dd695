"""Bases of pages on the GPU: the launch of device.py. The contract is docs/operators.md, `append_basis`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.page_basis import RANK
from tsa_compile.kernels.common.pages import PAGE, append_numbers
from tsa_compile.kernels.common.sizes import next_power_of_2
from tsa_compile.kernels.state.append_basis.reference import STEPS, build
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def append_basis(
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
    """`tsa::append_basis` by Triton. Nothing waits for the device; no number of rows compiles anything."""
    from tsa_compile.kernels.state.append_basis.device import append_basis_kernel

    batch, kv_heads, dim = begin.shape[0], k.shape[1], k.shape[3]
    if basis.numel() == 0 or batch == 0:
        return
    strides = [n for x in (basis, coords, scales) for n in x.stride()[:2]]
    launch(
        append_basis_kernel, (batch * kv_heads, new // PAGE + 1),
        (basis, coords, scales, k, blocks, start, begin, end, key_mask), append_numbers(k, strides, blocks, block, key_mask),
        D=dim, HALF=max(16, next_power_of_2(dim // 2)), RANK=RANK, STEPS=STEPS, ROUND=k.dtype == torch.bfloat16,
        num_warps=1,
    )  # fmt: skip


def page_basis(
    k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::page_basis` by Triton."""
    return build(append_basis, k, KvView(blocks, block, start, lengths), key_mask)
