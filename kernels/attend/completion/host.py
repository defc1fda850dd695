"""Completion of a decode step on the GPU: the launches of device.py. The contract is docs/operators.md, `complete_pages`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launch import IndexConfig, even_split_count, program_slots
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import CHUNK, PAGE
from tsa_compile.kernels.common.results import empty_result
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import precision

Tensor = torch.Tensor
BLOCK_M = 16  # query rows of a program, the least that its products take
MERGED_AT_ONCE = 64  # parts of a query row
#: Values wait for the number of keys, and so are copied a stage later than those of other indexes.
CONFIG = IndexConfig(num_warps=4, num_stages=5, resident=4)


def stages_of(tile_bytes: int, stages: int) -> int:
    """Stages of the loop over tiles of values: `stages` of up to 16 KB; of larger ones three, the least by which one is ahead."""
    return stages if tile_bytes <= 16 << 10 else 3


def complete_pages(
    out: Tensor,
    lse: Tensor,
    logits: Tensor,
    sums: Tensor,
    counts: Tensor,
    indices: Tensor,
    list_counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    *,
    config: IndexConfig = CONFIG,
) -> tuple[Tensor, Tensor]:
    """`tsa::complete_pages` by Triton. Nothing waits for the device; no length compiles anything."""
    from tsa_compile.kernels.attend.completion.device import complete_pages_kernel
    from tsa_compile.kernels.common.splits_device import merge_kernel

    (batch, heads, rows, dim), kv_heads, pages = out.shape, sums.shape[1], logits.shape[3]
    group = heads // kv_heads
    done, done_lse = empty_result(out, out), torch.empty_like(lse, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return done, done_lse
    tiles_m, block_pages, block_dv = cdiv(group * rows, BLOCK_M), max(1, block // PAGE), max(16, next_power_of_2(dim))
    programs = batch * kv_heads * tiles_m
    slots = program_slots(config.resident, out.device)
    splits = even_split_count(programs, max(1, cdiv(pages, CHUNK)), slots)
    part = out.new_empty(batch * heads * rows * (splits + 1), dim, dtype=torch.float32)
    part_lse = part.new_empty(part.shape[0])
    kept = torch.empty(programs, pages, dtype=torch.int32, device=out.device)
    tensors = (out, lse, logits, sums, counts, part, part_lse, kept, indices, list_counts, blocks, start, lengths)
    numbers = (
        *out.stride()[:3], *lse.stride()[:2], *sums.stride()[:3], counts.stride(0), 0 if blocks is None else blocks.stride(0),
        block_pages, max(1, sums.shape[2] // block_pages), kv_heads, group, rows, tiles_m, capacity, pages,
        indices.shape[2], splits,
    )  # fmt: skip
    launch(
        complete_pages_kernel, (programs, splits), tensors, numbers,
        DV=dim, BLOCK_DV=block_dv, BLOCK_M=BLOCK_M, Q=min(BLOCK_M, next_power_of_2(group * rows)), CHUNK=CHUNK,
        PRECISION=precision(sums.dtype), num_warps=config.num_warps,
        num_stages=stages_of(CHUNK * block_dv * sums.itemsize, config.num_stages),
    )  # fmt: skip
    launch(
        merge_kernel, (batch * heads * rows,), (part, part_lse, done, done_lse, None),
        (*done.stride()[:3], heads, rows, splits + 1),
        DV=dim, BLOCK_DV=block_dv, BLOCK_S=MERGED_AT_ONCE, num_warps=4 if block_dv <= 128 else 8,
    )  # fmt: skip
    return done, done_lse
