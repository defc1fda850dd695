"""Every key and some values, on the GPU. The contract is docs/operators.md, `sampled_value_attention`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.attend.sampled.config import SampledConfig, heads_at_once, sampled_config
from tsa_compile.kernels.attend.sampled.draw import TILE, spare_bits
from tsa_compile.kernels.common.launch import multiprocessors, split_count
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.results import empty_result
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import capability_of, precision, small_shared
from tsa_compile.kernels.common.view import capacity_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
RESIDENT = 4  # programs that a multiprocessor is to hold at a time
MERGED_AT_ONCE = 64  # parts of a query row
DRAWS_RESIDENT = 2  # programs of the draw that a multiprocessor is to hold at a time
TILES_AT_ONCE = 1024  # whose totals a program of the draw looks at


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

    def splits(self, programs: int, most: int, resident: int = RESIDENT) -> int:
        """Parts of something of at most `most` parts, so that all programs together fill whole waves of the GPU."""
        processors = multiprocessors(self.q.device) if self.q.is_cuda else 2  # the interpreter
        return split_count(programs, most, resident * processors)


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

    Scratch: 4 bytes for each query head and position; and some rows of float32 for each query head.
    """
    bias = None if mask is None else mask.expand(*q.shape[:3], mask.shape[3])
    return attend(
        Step(q, k, v, KvView(blocks, block, start, lengths), key_mask, bias, sinks, seed, samples, scale, softcap), form
    )


def attend(x: Step, form: str, config: SampledConfig | None = None) -> tuple[Tensor, Tensor]:
    """All launches; (out, lse). `config`: for measurements; None: as chosen for this GPU."""
    out, lse = empty_result(x.q, x.v), torch.empty(x.q.shape[:3], dtype=torch.float32, device=x.q.device)
    if out.numel() == 0:
        return out, lse
    shape = x.shapes
    config = config or sampled_config(shape["BLOCK_D"] * x.k.element_size(), shape["BLOCK_DV"], capability_of(x.q.device))
    _draw(x, form, config, out, lse, *_masses(x, config))
    return out, lse


def _masses(x: Step, config: SampledConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(masses, totals, exponents) of all keys, as `mass_kernel` has them."""
    from tsa_compile.kernels.attend.sampled.device import mass_kernel

    steps, shape = cdiv(x.tiles, config.tiles), x.shapes
    per_head = (*x.q.shape[:2], steps * config.tiles)
    masses, totals, exponents = x.new(*per_head, TILE), x.new(*per_head), x.new(*per_head, dtype=torch.float32)
    block_m, tiles_m = heads_at_once(x.group, shape["BLOCK_D"] * x.q.element_size())
    splits = x.splits(x.lists * tiles_m, steps, config.resident)
    launch(
        mass_kernel, (x.lists * tiles_m, splits),
        (x.q, x.k, masses, totals, exponents, x.view.blocks, x.view.start, x.view.lengths, x.key_mask, x.bias),
        (*_strides_of_scores(x), x.k.shape[1], x.group, capacity_of(x.k, x.view), x.view.block, x.per_row, splits, per_head[2],
         tiles_m, x.scale, x.softcap),
        D=shape["D"], BLOCK_D=shape["BLOCK_D"], BLOCK_M=block_m, TILES=config.tiles, CAPPED=x.softcap > 0,
        PRECISION=precision(x.q.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return masses, totals, exponents


def _draw(
    x: Step, form: str, config: SampledConfig, out: Tensor, lse: Tensor, masses: Tensor, totals: Tensor, exponents: Tensor
) -> None:
    from tsa_compile.kernels.attend.sampled.device import add_parts_kernel, sample_kernel

    (batch, heads), tiles, widths = x.q.shape[:2], totals.shape[2], {n: x.shapes[n] for n in ("DV", "BLOCK_DV")}
    most = x.samples if form == "prop" else max(x.samples, x.tiles)
    chunk = min(config.chunk, max(32, next_power_of_2(most)))
    parts = x.splits(batch * heads, cdiv(most, chunk), DRAWS_RESIDENT)
    part = lse if parts == 1 else x.new(batch, heads, parts, x.v.shape[3], dtype=torch.float32)
    launch(
        sample_kernel, (batch * heads, parts),
        (x.v, out, lse, part, masses, totals, exponents, x.view.blocks, x.view.start, x.view.lengths, x.sinks, x.seed),
        (*x.v.stride(), *out.stride()[:2], x.table_stride, x.seed_stride,
         heads, x.group, capacity_of(x.k, x.view), x.view.block, x.per_row, tiles, x.samples, spare_bits(x.tiles), parts),
        **widths, BLOCK_T=TILES_AT_ONCE, CHUNK=chunk, EQUAL=form == "flash", ONE=parts == 1,
        num_warps=config.draw_warps,
    )  # fmt: skip
    if parts > 1:
        launch(
            add_parts_kernel, (batch * heads,), (part, out), (*out.stride()[:2], heads, parts), **widths, AT_ONCE=32, num_warps=4
        )


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
