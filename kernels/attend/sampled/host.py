"""Every key and some values, on the GPU. The contract is docs/operators.md, `sampled_value_attention`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.attend.sampled.draw import TILE, spare_bits
from tsa_compile.kernels.common.launch import multiprocessors, split_count
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.results import empty_result
from tsa_compile.kernels.common.sizes import next_power_of_2
from tsa_compile.kernels.common.tiles import capability_of, precision, small_shared
from tsa_compile.kernels.common.view import capacity_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
RESIDENT = 4  # programs that a multiprocessor is to hold at a time
MERGED_AT_ONCE = 64  # parts of a query row
QUERY_BYTES = 16 << 10  # of a program's query rows


class Step(NamedTuple):
    """What all forms are launched with; `samples`: of a query head, values or teams."""

    q: Tensor
    k: Tensor
    v: Tensor
    view: KvView
    key_mask: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    seed: Tensor
    samples: int
    scale: float
    softcap: float

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def lists(self) -> int:
        return self.q.shape[0] * self.k.shape[1]

    @property
    def tiles(self) -> int:
        return max(1, -(-capacity_of(self.k, self.view) // TILE))

    @property
    def seed_stride(self) -> int:
        return self.seed.stride(0) if self.seed.shape[0] > 1 else 0

    @property
    def table_stride(self) -> int:
        return 0 if self.view.blocks is None else self.view.blocks.stride(0)

    @property
    def per_row(self) -> int:
        """Blocks in one entry of the first dimension of K and V."""
        return max(1, self.k.shape[2] // self.view.block)

    @property
    def shapes(self) -> dict[str, Any]:
        """Head dims, and what holds them."""
        block_d, block_dv = (max(16, 1 << (n - 1).bit_length()) for n in (self.q.shape[3], self.v.shape[3]))
        return {"D": self.q.shape[3], "DV": self.v.shape[3], "BLOCK_D": block_d, "BLOCK_DV": block_dv}

    def new(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def splits(self, programs: int, most: int) -> int:
        """Parts of something of at most `most` parts, so that all programs together fill whole waves of the GPU."""
        processors = multiprocessors(self.q.device) if self.q.is_cuda else 2  # the interpreter
        return split_count(programs, most, RESIDENT * processors)


def sampled_value_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    seed: Tensor,
    samples: int,
    form: str,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`tsa::sampled_value_attention` by Triton. Nothing waits for the device; no length compiles anything.

    Scratch of form "prop": 4 bytes for each query head and position, and 8 for each sample of a head.
    """
    out = empty_result(q, v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    bias = None if mask is None else mask.expand(*q.shape[:3], mask.shape[3])
    step = Step(q, k, v, KvView(blocks, block, start, lengths), key_mask, bias, sinks, seed, samples, scale, softcap)
    (_proportional if form == "prop" else _equal_tiles)(step, out, lse)
    return out, lse


def _proportional(x: Step, out: Tensor, lse: Tensor) -> None:
    from tsa_compile.kernels.attend.sampled import device

    (batch, heads), tiles, (start, lengths) = x.q.shape[:2], x.tiles, x.view[2:4]
    masses, slots = x.new(batch, heads, tiles * TILE), x.group * x.samples
    totals, counts, first_slots = (x.new(batch, n, tiles) for n in (heads, heads, x.k.shape[1]))
    exponents, worth = (x.new(*shape, dtype=torch.float32) for shape in ((batch, heads, tiles), (batch, heads)))
    indices, weights = x.new(batch, x.k.shape[1], slots), x.new(batch, heads, slots, dtype=torch.float32)
    tiled = x.shapes
    block_m, tiles_m = heads_at_once(x.group, max(tiled["BLOCK_D"], tiled["BLOCK_DV"]) * x.q.element_size())
    programs = x.lists * tiles_m
    splits = x.splits(programs, tiles)
    launch(
        device.mass_kernel, (programs, splits),
        (x.q, x.k, masses, totals, exponents, x.view.blocks, start, lengths, x.key_mask, x.bias),
        (*_strides_of_scores(x), x.k.shape[1], x.group, capacity_of(x.k, x.view), x.view.block, x.per_row, splits, tiles,
         tiles_m, x.scale, x.softcap), D=tiled["D"], BLOCK_D=tiled["BLOCK_D"], BLOCK_M=block_m, CAPPED=x.softcap > 0,
        PRECISION=precision(x.q.dtype), num_warps=4, num_stages=stages(x, tiled["BLOCK_D"]),
    )  # fmt: skip
    together = next_power_of_2(x.group)
    numbers = (x.seed_stride, x.k.shape[1], x.group, capacity_of(x.k, x.view), tiles, x.samples, slots)
    launch(
        device.tile_samples_kernel, (x.lists,),
        (totals, exponents, counts, first_slots, worth, lse, indices, start, lengths, x.sinks, x.seed),
        (*numbers, spare_bits(tiles)),
        BLOCK_M=together, BLOCK_T=max(64, 2048 // together), num_warps=8,
    )  # fmt: skip
    launch(
        device.draw_kernel, (tiles, x.lists),
        (masses, totals, exponents, counts, first_slots, worth, indices, weights, start, lengths, x.seed), numbers,
        BLOCK_M=together, num_warps=1 if together <= 8 else 4,
    )  # fmt: skip
    splits = x.splits(programs, -(-slots // TILE))
    part = out if splits == 1 else x.new(batch, heads, splits, x.v.shape[3], dtype=torch.float32)
    launch(
        device.value_kernel, (programs, splits), (x.v, out, part, indices, weights, x.view.blocks),
        (*x.v.stride(), *out.stride()[:2], x.table_stride,
         x.k.shape[1], x.group, x.view.block, x.per_row, slots, splits, tiles_m),
        DV=tiled["DV"], BLOCK_DV=tiled["BLOCK_DV"], BLOCK_M=block_m, ONE=splits == 1, PRECISION=precision(x.v.dtype),
        num_warps=4, num_stages=stages(x, tiled["BLOCK_DV"]),
    )  # fmt: skip
    if splits > 1:
        out.copy_(part.sum(2, keepdim=True))


def _equal_tiles(x: Step, out: Tensor, lse: Tensor) -> None:
    from tsa_compile.kernels.attend.sampled.flash_device import flash_kernel
    from tsa_compile.kernels.common.splits_device import merge_kernel

    (batch, heads), tiled = x.q.shape[:2], x.shapes
    block_m, tiles_m = heads_at_once(x.group, max(tiled["BLOCK_D"], tiled["BLOCK_DV"]) * x.q.element_size())
    programs = x.lists * tiles_m
    splits = x.splits(programs, x.tiles)
    part, part_lse = (x.new(batch, heads, splits, *shape, dtype=torch.float32) for shape in ((x.v.shape[3],), ()))
    of_scores = _strides_of_scores(x)
    launch(
        flash_kernel, (programs, splits),
        (x.q, x.k, x.v, part, part_lse, x.view.blocks, x.view.start, x.view.lengths, x.key_mask, x.bias, x.seed),
        (*of_scores[:7], *x.v.stride(), *of_scores[7:], x.seed_stride, x.k.shape[1], x.group,
         capacity_of(x.k, x.view), x.view.block, x.per_row, splits, tiles_m, x.samples, x.scale, x.softcap),
        **tiled, BLOCK_M=block_m, CAPPED=x.softcap > 0, PRECISION=precision(x.q.dtype),
        num_warps=4, num_stages=stages(x, tiled["BLOCK_D"] + tiled["BLOCK_DV"]),
    )  # fmt: skip
    launch(
        merge_kernel, (batch * heads,), (part, part_lse, out, lse, x.sinks), (*out.stride()[:3], heads, 1, splits),
        DV=tiled["DV"], BLOCK_DV=tiled["BLOCK_DV"], BLOCK_S=MERGED_AT_ONCE, num_warps=4 if tiled["BLOCK_DV"] <= 128 else 8,
    )  # fmt: skip


def heads_at_once(group: int, row_bytes: int) -> tuple[int, int]:
    """(query heads of a KV head in one program, such programs); row_bytes: of a query row, or of the sums of one."""
    block_m = min(64, max(16, QUERY_BYTES // row_bytes), max(16, 1 << (group - 1).bit_length()))
    return block_m, -(-group // block_m)


def stages(x: Step, width: int) -> int:
    """Tiles in flight, by the bytes of one."""
    return stages_of(TILE * width * x.k.element_size(), capability_of(x.q.device))


@functools.cache
def stages_of(tile_bytes: int, capability: tuple[int, int]) -> int:
    most = (64 << 10) if small_shared(capability) else (96 << 10)
    return max(1, min(4, most // tile_bytes))


def _strides_of_scores(x: Step) -> tuple[int, ...]:
    q, mask, bias = x.q.stride(), x.key_mask, x.bias
    of_bias = (0, 0, 0) if bias is None else (bias.stride(0), bias.stride(1), bias.stride(3))
    return q[0], q[1], q[3], *x.k.stride(), *((0, 0) if mask is None else mask.stride()), *of_bias, x.table_stride
