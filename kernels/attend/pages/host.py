"""Attention over kept key blocks on the GPU. The contract is docs/operators.md, `key_block_attention`."""

from __future__ import annotations

import functools

import torch

from tsa_compile.kernels.attend.pages import hopper
from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, key_block_count, row_block_count, word_count
from tsa_compile.kernels.common.tiles import LOG2_E, Config, capability_of, precision, section_heads, small_shared
from tsa_compile.kernels.common.view import length_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
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
    if scale <= 0:
        raise ValueError(f"tsa::key_block_attention on a GPU takes a positive scale, not {scale}")
    out = empty_result(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if need_lse else no_lse(q)
    if out.numel() > 0:
        view = KvView(blocks, block, start, lengths)
        launch(q, k, v, out, lse if need_lse else None, bits, view, key_mask, length_of(k, view, k_len), scale)
    return out, lse


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, bits: Tensor, view: KvView, key_mask: Tensor | None,
    k_len: int, scale: float,
) -> None:  # fmt: skip
    """Attention into `out`, and the log-sum-exp into `lse` if it is wanted: on Hopper by its own kernel, where that takes it."""
    if hopper.takes(q, k, v, view):
        return hopper.launch(q, k, v, out, lse, bits, view, key_mask, k_len, scale)
    launch_any(q, k, v, out, lse, bits, view, key_mask, k_len, scale)


def launch_any(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, bits: Tensor, view: KvView, key_mask: Tensor | None,
    k_len: int, scale: float,
) -> None:  # fmt: skip
    """`launch` by the Triton kernel for any GPU. Scratch: 4 bytes a key block and program."""
    import triton

    from tsa_compile.kernels.attend.pages.device import key_block_attention_kernel

    (batch, heads, q_len, dim), kv_heads, v_dim, blocks = q.shape, k.shape[1], v.shape[-1], view.blocks
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (dim, v_dim))
    config = tile_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    row_blocks = row_block_count(q_len, k_len)
    tiles = row_blocks * (ROWS // config.block_m)
    section = section_heads(heads, kv_heads, k_len, (dim + v_dim) * q.element_size())
    total = batch * heads * tiles
    programs, capacity = min(total, _programs(q.device)), key_block_count(k_len)
    scratch = torch.empty(programs, capacity, dtype=torch.int32, device=q.device)
    padding = (q if x is None else x for x in (view.start, view.lengths, key_mask))
    key_block_attention_kernel[(programs,)](
        q, k, v, out, out if lse is None else lse, bits, *padding, blocks, scratch,
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
        0 if key_mask is None else key_mask.stride(0),
        heads, kv_heads, bits.shape[1], q_len, k_len, row_blocks, word_count(k_len), tiles, section, total, capacity,
        0 if blocks is None else blocks.stride(0), view.block, max(1, k.shape[2] // view.block), scale * LOG2_E,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PER=KEYS // config.block_n, CHUNK=16,
        START=view.start is not None, LENGTH=view.lengths is not None, MASK=key_mask is not None, LSE=lse is not None,
        PRECISION=precision(q.dtype), **config.options,
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
