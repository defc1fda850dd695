"""Launch of the warp-specialised kernel for compute capability 9.0 (hopper_device.py)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tsa_compile.kernels.common.launch import multiprocessors
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, row_block_count, valid_range, word_count
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, section_heads
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
HEAD_DIMS = (64, 128)
STAGES = 3  # steps in flight
PANEL = 64  # columns that a copy brings: 128 bytes, which the swizzle of shared memory spans


def takes(q: Tensor, k: Tensor, v: Tensor, view: KvView) -> bool:
    """Whether the kernel runs this call: Hopper, half precision, head dim 64 or 128, rows that copies can address.

    Blocks anywhere must be whole entries of K, of a multiple of 64 rows: a key block then is one piece.
    """
    return (view.blocks is None or (view.block == k.shape[2] and view.block % KEYS == 0)) and (
        q.device.type == "cuda"
        and capability_of(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in HEAD_DIMS
        and all(_addressable(x) for x in (q, k, v))
    )


def _addressable(x: Tensor) -> bool:
    """The tensor memory accelerator takes addresses and strides of whole 16 bytes, none of them 0 or above 2^40."""
    b, h, row, last = _strides(x)
    most = 1 << 39
    return last == 1 and not (b | h | row) % 8 and not x.data_ptr() % 16 and 0 < b < most and 0 < h < most and 0 < row < most


def _strides(x: Tensor) -> list[int]:
    """Strides, in elements; those of dimensions of size 1, which say nothing, are a row's length."""
    (b, h, n, dim), (sb, sh, sn, last) = x.shape, x.stride()
    return [dim if b == 1 else sb, dim if h == 1 else sh, dim if n == 1 else sn, last]


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, bits: Tensor, view: KvView, key_mask: Tensor | None,
    k_len: int, scale: float,
) -> None:  # fmt: skip
    """As `host.launch`."""
    from tsa_compile.kernels.attend.pages.hopper_device import key_block_attention_hopper_kernel

    (batch, heads, q_len, dim), kv_heads, (table, block, start, lengths, _) = q.shape, k.shape[1], view
    row_blocks = row_block_count(q_len, k_len)
    section = section_heads(heads, kv_heads, k_len, 2 * dim * q.element_size())
    total = batch * heads * row_blocks
    holes = None if key_mask is None else _holes(start, lengths, key_mask)
    given = (bits if x is None else x for x in (start, lengths, key_mask, holes, table))
    queue = torch.zeros(1, dtype=torch.int32, device=q.device)
    pieces = (_descriptor(q, ROWS, dim), _descriptor(k, KEYS, PANEL), _descriptor(v, KEYS, PANEL))
    key_block_attention_hopper_kernel[(min(total, multiprocessors(q.device)),)](
        *pieces, out, out if lse is None else lse, bits, *given, queue, *out.stride()[:3],
        0 if key_mask is None else key_mask.stride(0), 0 if table is None else table.stride(0), block,
        heads, kv_heads, bits.shape[1], q_len, k_len, row_blocks,
        word_count(k_len), total, section, scale * LOG2_E,
        D=dim, STAGES=STAGES, START=start is not None, LENGTH=lengths is not None, MASK=key_mask is not None,
        LSE=lse is not None, TABLE=table is not None, num_warps=4,
    )  # fmt: skip


def _holes(start: Tensor | None, lengths: Tensor | None, key_mask: Tensor) -> Tensor:
    """bool `[B]`: whether the mask hides a key of the range that `start` and `lengths` give."""
    batch, k_len = key_mask.shape
    first, end = valid_range(batch, k_len, start, lengths, key_mask.device)
    position = torch.arange(k_len, device=key_mask.device)
    return (~key_mask & (position >= first[:, None]) & (position < end[:, None])).any(1)


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """What the tensor memory accelerator reads pieces `[rows, columns]` of `[B, heads, length, D]` by; zeros outside."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), _strides(x), [1, 1, rows, columns], _layout())


@functools.cache
def _layout() -> Any:
    """Of pieces in shared memory; making one takes longer than a launch's other steps."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(128, 16, 4)
