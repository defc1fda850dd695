"""Page scores on the GPU: the launch of device.py. The contract is docs/operators.md, `page_scores`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launch import IndexConfig, even_split_count, program_slots
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import CHUNK, PAGE, pages_of
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import precision

Tensor = torch.Tensor
CONFIG = IndexConfig(num_warps=4, num_stages=3, resident=4)


def stages_of(tile_bytes: int, stages: int) -> int:
    """Stages of a loop over tiles of an index: `stages` of up to 16 KB; of larger ones so few that every GPU holds them."""
    return stages if tile_bytes <= 16 << 10 else 2 if tile_bytes <= 32 << 10 else 1


def page_scores(
    q: Tensor,
    sums: Tensor,
    counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    scale: float,
    *,
    config: IndexConfig = CONFIG,
) -> tuple[Tensor, Tensor]:
    """`tsa::page_scores` by Triton. Products run in the dtype of `sums`. Nothing waits for the device."""
    from tsa_compile.kernels.score.page_index.device import page_scores_kernel

    (batch, heads, rows, dim), kv_heads = q.shape, sums.shape[1]
    pages, group = pages_of(capacity), heads // kv_heads
    chunks = cdiv(pages, CHUNK)
    logits = q.new_empty(batch, heads, rows, pages, dtype=torch.float32)
    parts = q.new_empty(batch, heads, rows, chunks, dtype=torch.float32)
    if logits.numel() == 0:
        return logits, parts
    block_d = max(16, next_power_of_2(dim))
    block_m = min(64 if block_d * sums.itemsize <= 256 else 16, max(16, next_power_of_2(group * rows)))
    tiles_m, block_pages = cdiv(group * rows, block_m), max(1, block // PAGE)
    programs = batch * kv_heads * tiles_m
    splits = even_split_count(programs, chunks, program_slots(config.resident, q.device))
    numbers = (
        *q.stride(), *sums.stride()[:3], counts.stride(0), 0 if blocks is None else blocks.stride(0),
        block_pages, max(1, sums.shape[2] // block_pages), kv_heads, group, rows, tiles_m, capacity, pages, chunks,
        splits, scale,
    )  # fmt: skip
    tensors = (q, sums, counts, logits, parts, blocks, start, lengths)
    launch(
        page_scores_kernel, (programs, splits), tensors, numbers,
        D=dim, BLOCK_D=block_d, BLOCK_M=block_m, Q=min(block_m, next_power_of_2(group * rows)),
        CHUNK=CHUNK, STAGES=stages_of(CHUNK * block_d * sums.itemsize, config.num_stages), PRECISION=precision(sums.dtype),
        num_warps=config.num_warps,
    )  # fmt: skip
    return logits, parts
