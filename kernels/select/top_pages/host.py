"""The pages of a decode step on the GPU: all shares, then the lists. The contract is docs/operators.md, `select_pages`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tsa_compile.kernels.common import launcher
from tsa_compile.kernels.common.launch import constant
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import capability_of
from tsa_compile.kernels.select.top_pages.budget import list_capacity

Tensor = torch.Tensor


class ListConfig(NamedTuple):
    """Sizes of the two launches; `tsa-compile bench decode --sweep select` times others."""

    tile: int = 512  # pages whose shares one program makes
    share_warps: int = 4
    small: int = 2048  # pages that a program holds to make a list; up to `block` if a row has more than `small`
    block: int = 8192  # at most 16,384; scores of longer rows are read at each look
    warps: int = 8
    early: bool = True  # the second launch starts while the first runs, where the GPU can: from compute capability 9.0 on


CONFIG = ListConfig()


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
    most = list_capacity(logits.shape[3], keep, table, mass, sinks + recent)
    new = functools.partial(torch.empty, device=logits.device, dtype=torch.int32)
    indices, number = new((logits.shape[0], kv_heads, most)), new((logits.shape[0], kv_heads))
    if number.numel():
        view = (blocks, block, start, lengths, capacity)
        launch(logits, parts, counts, view, (keep, table, mass, sinks, recent), indices, number, CONFIG)
    return indices, number


View = tuple[Tensor | None, int, Tensor | None, Tensor | None, int]  # blocks, block, start, lengths, capacity
Rule = tuple[Sequence[float], Sequence[int], float, int, int]  # keep, table, mass, sinks, recent


def launch(
    logits: Tensor, parts: Tensor, counts: Tensor, view: View, rule: Rule, indices: Tensor, number: Tensor, config: ListConfig
) -> None:
    """Both launches, to `indices` `[B, Hk, N]` and `number` `[B, Hk]`, int32; at least one list."""
    config = config._replace(early=config.early and logits.is_cuda and capability_of(logits.device) >= (9, 0))
    groups = max(1, -(-logits.shape[3] // 16))
    scores = torch.empty((number.numel(), 16 * groups), dtype=torch.int32, device=logits.device)
    if logits.shape[3]:
        launch_shares(logits, parts, counts, scores, view, rule, number.shape[1], config)
    launch_lists(scores, indices, number, view, rule, config)


def launch_shares(
    logits: Tensor, parts: Tensor, counts: Tensor, scores: Tensor, view: View, rule: Rule, kv_heads: int, config: ListConfig
) -> None:
    """The first launch, to `scores` int32 `[B * Hk, 16 * groups]`; at least one page."""
    from tsa_compile.kernels.select.top_pages.shares_device import page_shares_kernel

    (_, heads, rows, pages), (blocks, block, start, lengths, capacity), (sinks, recent) = logits.shape, view, rule[3:]
    queries, block_pages = heads // kv_heads * rows, max(1, block // PAGE)
    in_tile = next_power_of_2(queries)
    at_once = 4096 // in_tile
    tile, chunks = min(config.tile, max(32, at_once)), min(128, max(16, at_once))
    numbers = (
        counts.stride(0), 0 if blocks is None else blocks.stride(0), block_pages, max(1, counts.shape[2] // block_pages),
        kv_heads, queries, capacity, pages, parts.shape[3], scores.shape[1] // 16, sinks, recent,
    )  # fmt: skip
    tensors = (logits, parts, counts, scores, blocks, start, lengths)
    launcher.launch(
        page_shares_kernel, (len(scores), cdiv(pages, tile)), tensors, numbers,
        QUERIES=in_tile, CHUNKS=chunks, TILE=tile, EARLY=config.early, num_warps=config.share_warps,
    )  # fmt: skip


def launch_lists(scores: Tensor, indices: Tensor, number: Tensor, view: View, rule: Rule, config: ListConfig) -> None:
    """The second launch."""
    from tsa_compile.kernels.select.top_pages.list_device import page_lists_kernel

    (start, lengths, capacity), (keep, table, mass) = view[2:], rule[:3]
    shares = [share_bits(x) for x in keep]
    of_heads = None if len(shares) == 1 else constant(tuple(shares), torch.int64, scores.device)
    mass_bits = struct.unpack("<q", struct.pack("<d", mass))[0]
    early = {"launch_pdl": True} if config.early else {}
    tensors = (scores, indices, number, start, lengths, of_heads, constant(tuple(table), torch.int32, scores.device))
    launcher.launch(
        page_lists_kernel, (len(scores),), tensors,
        (indices.shape[1], capacity, scores.shape[1] // 16, indices.shape[2], shares[0], len(table), mass_bits),
        SMALL=config.small, BLOCK=config.block, MASS=mass > 0, EARLY=config.early, num_warps=config.warps, **early,
    )  # fmt: skip
