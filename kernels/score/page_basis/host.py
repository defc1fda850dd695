"""Scores of pages by their bases on the GPU: the launch of device.py. The contract is docs/operators.md, `refine_scores`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.kernels.common.launch import even_split_count, program_slots
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import CHUNK, PAGE
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import precision

Tensor = torch.Tensor
BLOCK_M = 16  # query rows of a program, the least that its products take
COPIED = 2048  # logits that a program copies at a time


class BasisConfig(NamedTuple):
    """How a list is cut into programs; `tsa-compile bench decode --sweep refine` times others.

    Args:
        tile: pages at a time.
        num_warps, num_stages: of a program.
        resident: programs that a multiprocessor holds at a time.
    """

    tile: int = 32
    num_warps: int = 8
    num_stages: int = 2
    resident: int = 2


CONFIG = BasisConfig()


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
    *,
    config: BasisConfig = CONFIG,
) -> tuple[Tensor, Tensor]:
    """`tsa::refine_scores` by Triton. Nothing waits for the device; no length compiles anything."""
    from tsa_compile.kernels.score.page_basis.device import refine_scores_kernel

    (batch, heads, rows, dim), kv_heads, pages = q.shape, basis.shape[1], logits.shape[3]
    chunks, group = cdiv(pages, CHUNK), heads // kv_heads
    refined = torch.empty_like(logits)
    parts = q.new_empty(batch, heads, rows, chunks, dtype=torch.float32)
    if refined.numel() == 0:
        return refined, parts
    queries, half = min(BLOCK_M, next_power_of_2(group * rows)), dim // 2
    words = half // 2 if half % 2 == 0 else half
    tiles_m, block_pages = cdiv(group * rows, BLOCK_M), max(1, block // PAGE)
    listed, programs = pages if indices is None else indices.shape[2], batch * kv_heads * tiles_m
    slots = program_slots(config.resident, q.device)
    splits = even_split_count(programs, max(1, cdiv(listed, config.tile)), slots)
    read = basis.view(torch.int16) if half % 2 == 0 else basis
    strides = [n for x in (read, coords, scales) for n in x.stride()[:2]]
    tensors = (q, logits, counts, read, coords, scales, refined, parts, indices, list_counts, blocks, start, lengths)
    numbers = (
        *q.stride(), counts.stride(0), *strides, 0 if blocks is None else blocks.stride(0),
        block_pages, max(1, basis.shape[2] // block_pages), kv_heads, group, rows, tiles_m, capacity, pages, chunks,
        0 if indices is None else indices.shape[2], splits, scale,
    )  # fmt: skip
    launch(
        refine_scores_kernel, (programs, splits), tensors, numbers,
        D=dim, WORDS=words, BLOCK_W=max(16, next_power_of_2(cdiv(half, 2))), BLOCK_M=BLOCK_M, Q=queries, CHUNK=CHUNK,
        TILE=config.tile, STEP=max(CHUNK, COPIED // queries), STAGES=config.num_stages,
        PRECISION=precision(q.dtype), num_warps=config.num_warps,
    )  # fmt: skip
    return refined, parts
