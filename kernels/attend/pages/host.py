"""Attention over kept key blocks on the GPU. The contract is docs/operators.md, `key_block_attention`."""

from __future__ import annotations

import functools

import torch

from tsa_compile.kernels.attend.pages import hopper
from tsa_compile.kernels.common.launcher import Launch
from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, key_block_count, row_block_count, word_count
from tsa_compile.kernels.common.sizes import next_power_of_2
from tsa_compile.kernels.common.tiles import LOG2_E, Config, capability_of, precision, section_heads, small_shared
from tsa_compile.kernels.common.view import length_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
Shape = tuple[int, ...]
_PER_PROCESSOR = 8  # programs, at most, that run on a multiprocessor at once


def key_block_attention(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, need_lse: bool, *, k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tsa::key_block_attention`: (out `[B, H, Lq, Dv]`, stored as `[B, Lq, H, Dv]`; lse float32 `[B, H, Lq]`, or `[0]`).

    Nothing waits for the device.

    Raises:
        ValueError: the scale is not positive.
    """
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if need_lse else None
    view = KvView(blocks, block, start, lengths)
    out = attend(q, k, v, lse, bits, view, key_mask, length_of(k, view, k_len), scale)
    return out, no_lse(q) if lse is None else lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, bits: Tensor, view: KvView, key_mask: Tensor | None, k_len: int,
    scale: float, flags: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `key_block_attention`: out, and the log-sum-exp into `lse` if it is wanted; on Hopper by its own kernel where it can.

    Args:
        flags: int32 `[FLAGS + B]` by the launch that chose the key blocks; None: made here, if they are needed.
    """
    if scale <= 0:
        raise ValueError(f"tsa::key_block_attention on a GPU takes a positive scale, not {scale}")
    out = empty_result(q, v)
    operands = (q, k, v, out, lse, bits, view, key_mask, k_len, scale)
    if out.numel() > 0 and not hopper.launch(*operands, flags):
        launch_any(*operands)
    return out


def launch_any(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, bits: Tensor, view: KvView, key_mask: Tensor | None,
    k_len: int, scale: float,
) -> None:  # fmt: skip
    """Attention into `out`, and the log-sum-exp into `lse` if it is wanted, by the Triton kernel for any GPU.

    Scratch: 4 bytes a key block and program.
    """
    blocks, block, start, lengths, _ = view
    apart = (0 if key_mask is None else key_mask.stride(0), 0 if blocks is None else blocks.stride(0))
    given = (start is not None, lengths is not None, key_mask is not None, lse is not None)
    strides = (q.stride(), k.stride(), v.stride(), out.stride())
    run = _launch(q.device, q.dtype, q.shape, k.shape, v.shape, *strides, bits.shape[1], k_len, scale, block, *apart, *given)
    scratch = torch.empty(run.grid[0], key_block_count(k_len), dtype=torch.int32, device=q.device)
    run(
        q, k, v, out, out if lse is None else lse, bits, *[q if x is None else x for x in (start, lengths, key_mask)], blocks,
        scratch,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _launch(
    device: torch.device, dtype: torch.dtype, q: Shape, k: Shape, v: Shape, q_strides: Shape, k_strides: Shape, v_strides: Shape,
    out_strides: Shape, lists: int, k_len: int, scale: float, block: int, m_sb: int, blocks_sb: int, start: bool, lengths: bool,
    key_mask: bool, lse: bool,
) -> Launch:  # fmt: skip
    """Of operands of these shapes and strides; lists: of the bitmap; m_sb, blocks_sb: rows of mask and table are so far apart."""
    from tsa_compile.kernels.attend.pages.device import key_block_attention_kernel

    (batch, heads, q_len, dim), kv_heads, v_dim = q, k[1], v[3]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (dim, v_dim))
    config = tile_config(max(block_d, block_dv), dtype, capability_of(device))
    row_blocks = row_block_count(q_len, k_len)
    tiles = row_blocks * (ROWS // config.block_m)
    section = section_heads(heads, kv_heads, k_len, (dim + v_dim) * dtype.itemsize)
    total = batch * heads * tiles
    numbers = (
        *q_strides, *k_strides, *v_strides, *out_strides[:3], m_sb,
        heads, kv_heads, lists, q_len, k_len, row_blocks, word_count(k_len), tiles, section, total, key_block_count(k_len),
        blocks_sb, block, max(1, k[2] // block), scale * LOG2_E,
    )  # fmt: skip
    return Launch(
        key_block_attention_kernel, (min(total, _programs(device)),), numbers,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PER=KEYS // config.block_n, CHUNK=16, START=start, LENGTH=lengths, MASK=key_mask, LSE=lse, PRECISION=precision(dtype),
        **config.options,
    )  # fmt: skip


def tile_config(block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """Rows and keys of a step; block_d: the larger head dim, rounded up to a power of two."""
    if dtype == torch.float32 and block_d > 64 and small_shared(capability):
        return Config(64, 16, 4, 2) if block_d <= 128 else Config(16, 16, 4, 2)
    if block_d > 64 and small_shared(capability):
        return Config(128, 32, 8, 3) if block_d <= 128 else Config(64, 16, 4, 3)
    if dtype == torch.float32:
        return Config(64, 32, 4, 2) if block_d <= 128 else Config(32, 16, 4, 2)
    if block_d <= 128:
        return Config(128, 64, 4 if block_d <= 64 else 8, 3)
    return Config(64, 32, 4, 3)


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that fill the device; a few on a CPU, where Triton's interpreter runs them in turn."""
    if device.type != "cuda":
        return 3
    return _PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
