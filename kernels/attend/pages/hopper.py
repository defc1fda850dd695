"""Launch of the warp-specialised kernels for capability 9.0: hopper_device.py; hopper_wide_device.py for heads of 256."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.common.launch import multiprocessors
from tsa_compile.kernels.common.launcher import Launch, Pieces
from tsa_compile.kernels.common.row_blocks import FLAGS, KEYS, ROWS, row_block_count, valid_range, word_count
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, section_heads
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
Shape = tuple[int, ...]
HEAD_DIMS = (64, 128, 256)
WIDE = 256  # the head dim of the wide kernel
STAGES = 3  # steps in flight
WIDE_STAGES = {"K_STAGES": 2, "V_STAGES": 3}  # key blocks whose keys, whose values are in flight
PANEL = 64  # columns that a copy brings: 128 bytes, which the swizzle of shared memory spans


class _Plan(NamedTuple):
    """A launch, and by what it reads pieces of q, k and v."""

    launch: Launch
    q: Pieces
    k: Pieces
    v: Pieces


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, bits: Tensor, view: KvView, key_mask: Tensor | None,
    k_len: int, scale: float, flags: Tensor | None = None,
) -> bool:  # fmt: skip
    """As `host.launch`; False, and nothing else, if the kernel does not take the call.

    It takes Hopper, half precision, head dim 64, 128 or 256, and rows that the tensor memory accelerator can address. Blocks
    anywhere must be whole entries of K, of a multiple of 64 rows: a key block then is one piece.
    """
    table, block, start, lengths, _ = view
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return False
    apart = (0 if key_mask is None else key_mask.stride(0), 0 if table is None else table.stride(0))
    given = (start is not None, lengths is not None, key_mask is not None, lse is not None, table is not None)
    strides = (q.stride(), k.stride(), v.stride(), out.stride())
    plan = _plan(q.device, q.dtype, q.shape, k.shape, v.shape, *strides, bits.shape[1], k_len, scale, block, *apart, *given)
    if plan is None:
        return False
    if flags is None:
        flags = torch.zeros(FLAGS + q.shape[0], dtype=torch.int32, device=q.device)
        if key_mask is not None:
            flags[FLAGS:] = _holes(start, lengths, key_mask)
    holes = None if key_mask is None else flags[FLAGS:]
    plan.launch(
        plan.q.of(q), plan.k.of(k), plan.v.of(v), out, out if lse is None else lse, bits,
        *[bits if x is None else x for x in (start, lengths, key_mask, holes, table)], flags,
    )  # fmt: skip
    return True


@functools.lru_cache(maxsize=1024)
def _plan(
    device: torch.device, dtype: torch.dtype, q: Shape, k: Shape, v: Shape, q_strides: Shape, k_strides: Shape, v_strides: Shape,
    out_strides: Shape, lists: int, k_len: int, scale: float, block: int, m_sb: int, table_sb: int, start: bool, lengths: bool,
    key_mask: bool, lse: bool, table: bool,
) -> _Plan | None:  # fmt: skip
    """Of operands of these shapes and strides; lists: of the bitmap; m_sb, table_sb: rows of mask and table are so far apart."""
    (batch, heads, q_len, dim), kv_heads = q, k[1]
    if device.type != "cuda" or capability_of(device) != (9, 0) or dtype not in (torch.float16, torch.bfloat16):
        return None
    if dim != v[3] or dim not in HEAD_DIMS or (table and (block != k[2] or block % KEYS)):
        return None
    operands = ((q, q_strides), (k, k_strides), (v, v_strides))
    if not all(_is_addressable(*x) for x in operands):
        return None
    row_blocks = row_block_count(q_len, k_len)
    section = section_heads(heads, kv_heads, k_len, 2 * dim * dtype.itemsize)
    total = batch * heads * row_blocks
    numbers = (
        *out_strides[:3], m_sb, table_sb, block, heads, kv_heads, lists, q_len, k_len, row_blocks, word_count(k_len), total,
        section, scale * LOG2_E,
    )  # fmt: skip
    kernel, stages, columns = kernel_of(dim)
    launch = Launch(
        kernel, (min(total, multiprocessors(device)),), numbers, D=dim, **stages,
        START=start, LENGTH=lengths, MASK=key_mask, LSE=lse, TABLE=table, num_warps=4,
    )  # fmt: skip
    pieces = ((ROWS, dim), (KEYS, columns), (KEYS, columns))
    made = (
        Pieces(dtype, list(shape), _strides(shape, strides), [1, 1, *piece], _layout())
        for (shape, strides), piece in zip(operands, pieces, strict=True)
    )
    return _Plan(launch, *made)


def kernel_of(dim: int) -> tuple[Any, dict[str, int], int]:
    """(The kernel for heads of `dim`, its rings' stages, columns of a copy of keys or values)."""
    if dim == WIDE:
        from tsa_compile.kernels.attend.pages.hopper_wide_device import key_block_attention_wide_kernel

        return key_block_attention_wide_kernel, WIDE_STAGES, dim
    from tsa_compile.kernels.attend.pages.hopper_device import key_block_attention_hopper_kernel

    return key_block_attention_hopper_kernel, {"STAGES": STAGES}, PANEL


def _is_addressable(shape: Shape, strides: Shape) -> bool:
    """The tensor memory accelerator takes strides of whole 16 bytes, none of them 0 or above 2^40."""
    b, h, row, last = _strides(shape, strides)
    most = 1 << 39
    return last == 1 and not (b | h | row) % 8 and 0 < b < most and 0 < h < most and 0 < row < most


def _strides(shape: Shape, strides: Shape) -> list[int]:
    """Strides, in elements; those of dimensions of size 1, which say nothing, are a row's length."""
    (b, h, n, dim), (sb, sh, sn, last) = shape, strides
    return [dim if b == 1 else sb, dim if h == 1 else sh, dim if n == 1 else sn, last]


def _holes(start: Tensor | None, lengths: Tensor | None, key_mask: Tensor) -> Tensor:
    """bool `[B]`: whether the mask hides a key of the range that `start` and `lengths` give."""
    batch, k_len = key_mask.shape
    first, end = valid_range(batch, k_len, start, lengths, key_mask.device)
    position = torch.arange(k_len, device=key_mask.device)
    return (~key_mask & (position >= first[:, None]) & (position < end[:, None])).any(1)


@functools.cache
def _layout() -> Any:
    """Of pieces in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(128, 16, 4)
