"""The pages of a decode step on the GPU: the launch of device.py. The contract is docs/operators.md, `select_pages`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.launch import constant
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.select.top_pages.budget import list_capacity, share_bits

Tensor = torch.Tensor
TILE = 16384  # logits at a time; on an H200 with 8 warps ahead of half and of double of it


def select_pages(
    logits: Tensor,
    parts: Tensor,
    counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    kv_heads: int,
    keep: Sequence[float],
    table: Sequence[int],
    mass: float,
    sinks: int,
    recent: int,
) -> tuple[Tensor, Tensor]:
    """`tsa::select_pages` by Triton. Nothing waits for the device; no length compiles anything."""
    import triton

    from tsa_compile.kernels.select.top_pages.device import top_pages_kernel

    batch, heads, rows, pages = logits.shape
    queries, most = heads // kv_heads * rows, list_capacity(pages, keep, table, mass, sinks + recent)
    new = functools.partial(torch.empty, device=logits.device)
    indices = new((batch, kv_heads, most), dtype=torch.int32)
    number = new((batch, kv_heads), dtype=torch.int32)
    if number.numel() == 0:
        return indices, number
    scratch = new((2, batch, kv_heads, max(1, pages)), dtype=torch.float32)
    shares = [share_bits(x) for x in keep]
    of_heads = None if len(shares) == 1 else constant(tuple(shares), torch.int64, logits.device)
    mass_bits = struct.unpack("<q", struct.pack("<d", mass))[0]
    in_tile = triton.next_power_of_2(queries)
    block_pages = max(1, block // PAGE)
    top_pages_kernel[(batch * kv_heads,)](
        logits, parts, counts, *scratch, indices, number, blocks, start, lengths, of_heads,
        constant(tuple(table), torch.int32, logits.device),
        counts.stride(0), 0 if blocks is None else blocks.stride(0), block_pages, max(1, counts.shape[2] // block_pages),
        kv_heads, queries, capacity, pages, parts.shape[3], most, shares[0], len(table), mass_bits, sinks, recent,
        QUERIES=in_tile, BLOCK=max(256, min(4096, TILE // in_tile)), MASS=mass > 0, num_warps=8,
    )  # fmt: skip
    return indices, number
