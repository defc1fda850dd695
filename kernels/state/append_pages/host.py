"""Page sums on the GPU: the launch of device.py. The contract is docs/operators.md, `append_pages`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import PAGE, append_numbers
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.state.append_pages.reference import build
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
PAGES_AT_ONCE = 4


def append_pages(
    sums: Tensor,
    counts: Tensor,
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    begin: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    new: int,
) -> None:
    """`tsa::append_pages` by Triton. Nothing waits for the device; no number of rows compiles anything."""
    from tsa_compile.kernels.state.append_pages.device import append_pages_kernel

    batch, kv_heads, dim = begin.shape[0], k.shape[1], k.shape[3]
    if sums.numel() == 0 or batch == 0:
        return
    numbers = append_numbers(k, (*sums.stride()[:3], counts.stride(0)), blocks, block, key_mask)
    launch(
        append_pages_kernel, (batch * kv_heads, cdiv(new // PAGE + 1, PAGES_AT_ONCE)),
        (sums, counts, k, blocks, start, begin, end, key_mask), numbers,
        D=dim, BLOCK_D=max(16, next_power_of_2(dim)), PAGES=PAGES_AT_ONCE, num_warps=4,
    )  # fmt: skip


def page_sums(
    k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`tsa::page_sums` by Triton."""
    return build(append_pages, k, KvView(blocks, block, start, lengths), key_mask)
