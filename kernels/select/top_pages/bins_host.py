"""The lists of pages by one launch (bins_device.py): what `tsa-compile bench decode --sweep select` compares host.py with."""

from __future__ import annotations

import struct

import torch

from tsa_compile.kernels.common.launch import constant
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.common.sizes import next_power_of_2
from tsa_compile.kernels.select.top_pages.host import Rule, View

Tensor = torch.Tensor
TILE = 16384  # logits at a time; on an H200 with 8 warps ahead of half and of double of it


def launch_bins(logits: Tensor, parts: Tensor, counts: Tensor, view: View, rule: Rule, indices: Tensor, number: Tensor) -> None:
    """As `host.launch`."""
    from tsa_compile.kernels.select.top_pages.bins_device import top_pages_kernel

    (batch, heads, rows, pages), (_, kv_heads, most) = logits.shape, indices.shape
    (blocks, block, start, lengths, capacity), (keep, table, mass, sinks, recent) = view, rule
    queries = heads // kv_heads * rows
    scratch = torch.empty((2, batch, kv_heads, max(1, pages)), dtype=torch.float32, device=logits.device)
    shares = [share_bits(x) for x in keep]
    of_heads = None if len(shares) == 1 else constant(tuple(shares), torch.int64, logits.device)
    mass_bits = struct.unpack("<q", struct.pack("<d", mass))[0]
    in_tile = next_power_of_2(queries)
    block_pages = max(1, block // PAGE)
    budget = constant(tuple(table), torch.int32, logits.device)
    numbers = (
        counts.stride(0), 0 if blocks is None else blocks.stride(0), block_pages, max(1, counts.shape[2] // block_pages),
        kv_heads, queries, capacity, pages, parts.shape[3], most, shares[0], len(table), mass_bits, sinks, recent,
    )  # fmt: skip
    launch(
        top_pages_kernel, (batch * kv_heads,),
        (logits, parts, counts, *scratch, indices, number, blocks, start, lengths, of_heads, budget), numbers,
        QUERIES=in_tile, BLOCK=max(256, min(4096, TILE // in_tile)), MASS=mass > 0, num_warps=8,
    )  # fmt: skip
