"""Scores of pages by their bases on the GPU: the launch of device.py. The contract is docs/operators.md, `refine_scores`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.page_basis import RANK
from tsa_compile.kernels.common.pages import CHUNK, PAGE
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import precision

Tensor = torch.Tensor
BLOCK_M = 16  # query rows of a program, the least that its products take
TILE = 16  # pages at a time


def refine_scores(
    q: Tensor,
    logits: Tensor,
    counts: Tensor,
    basis: Tensor,
    coords: Tensor,
    scales: Tensor,
    indices: Tensor | None,
    list_counts: Tensor | None,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`tsa::refine_scores` by Triton. Nothing waits for the device; no length compiles anything."""
    from tsa_compile.kernels.score.page_basis.device import refine_scores_kernel

    (batch, heads, rows, dim), kv_heads, pages = q.shape, basis.shape[1], logits.shape[3]
    chunks, group = cdiv(pages, CHUNK), heads // kv_heads
    refined = torch.empty_like(logits)
    parts = q.new_empty(batch, heads, rows, chunks, dtype=torch.float32)
    if refined.numel() == 0:
        return refined, parts
    tiles_m, block_pages = cdiv(group * rows, BLOCK_M), max(1, block // PAGE)
    strides = [n for x in (basis, coords, scales) for n in x.stride()[:2]]
    tensors = (q, logits, counts, basis, coords, scales, refined, parts, indices, list_counts, blocks, start, lengths)
    numbers = (
        *q.stride(), counts.stride(0), *strides, 0 if blocks is None else blocks.stride(0),
        block_pages, max(1, basis.shape[2] // block_pages), kv_heads, group, rows, tiles_m, capacity, pages, chunks,
        0 if indices is None else indices.shape[2], scale,
    )  # fmt: skip
    launch(
        refine_scores_kernel, (batch * kv_heads * tiles_m, chunks), tensors, numbers,
        D=dim, HALF=max(16, next_power_of_2(dim // 2)), RANK=RANK, BLOCK_M=BLOCK_M, CHUNK=CHUNK, TILE=TILE,
        PRECISION=precision(q.dtype), num_warps=4,
    )  # fmt: skip
    return refined, parts
