"""Launch of the warp-specialised prefill kernel for compute capability 9.0."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tsa_compile.kernels.common import launcher
from tsa_compile.kernels.common.launch import multiprocessors
from tsa_compile.kernels.common.sizes import cdiv
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, section_heads

Tensor = torch.Tensor
Shape = tuple[int, ...]
HEAD_DIMS = (64, 128)
BLOCK, STAGES = 128, 3  # queries of a tile and keys of a block, as in hopper_ring_device.py; blocks in flight
#: Tiles a program from which they are taken from a queue, which costs a launch to clear, but keeps programs together, and so the
#: rows they read in L2, and ends them together.
QUEUED_FROM = 16


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel runs this call: Hopper, half precision, head dim 64 or 128, rows of whole 16-byte pieces."""
    return (
        q.device.type == "cuda"
        and capability_of(q.device) == (9, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in HEAD_DIMS
        and all(_aligned(x) for x in (q, k, v))
    )


def _aligned(x: Tensor) -> bool:
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in outer)


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, indices: Tensor, counts: Tensor, scale: float,
    packed: bool = False,
) -> None:  # fmt: skip
    """As `fused.launch_prefill`. `packed`: k and v are the kept rows of each list, [B, G, Lk, D], finite up to BLOCK rows behind
    the last."""
    strides = (q.stride()[:3], k.stride()[:3], v.stride()[:3], out.stride()[:3], indices.stride()[:2])
    run, queued = _launch(q.device, q.dtype, q.shape, k.shape, indices.shape[1], *strides, scale, lse is not None, packed)
    queue = torch.zeros(1, dtype=torch.int32, device=q.device) if queued else counts
    at = (_descriptor(k), _descriptor(v)) if packed else (k, v)
    run(q, *at, out, out if lse is None else lse, indices, counts, queue)


@functools.lru_cache(maxsize=1024)
def _launch(
    device: torch.device, dtype: torch.dtype, q: Shape, k: Shape, lists: int, q_strides: Shape, k_strides: Shape,
    v_strides: Shape, out_strides: Shape, indices_strides: Shape, scale: float, strip: bool, packed: bool,
) -> tuple[launcher.Launch, bool]:  # fmt: skip
    """Of operands of these shapes and strides; and whether tiles are taken from a queue."""
    from tsa_compile.kernels.attend.tokens.hopper_device import sparse_prefill_hopper_kernel

    (batch, heads, q_len, dim), (kv_heads, k_len) = q, k[1:3]
    tiles = min(cdiv(k_len, BLOCK), cdiv(q_len, BLOCK) + 1)
    section = section_heads(heads, kv_heads, k_len, 2 * dim * dtype.itemsize)
    total = batch * heads * tiles
    programs = min(total, multiprocessors(device))
    queued = total >= QUEUED_FROM * programs
    numbers = (
        *q_strides, *k_strides, *v_strides, *out_strides, *indices_strides,
        heads, kv_heads, lists, q_len, k_len, total, tiles, section, int(queued), scale * LOG2_E,
    )  # fmt: skip
    run = launcher.Launch(
        sparse_prefill_hopper_kernel, (programs,), numbers, D=dim, STAGES=STAGES, STRIP=strip, PACKED=packed, num_warps=4
    )
    return run, queued


def _descriptor(packed: Tensor) -> Any:
    """What the tensor memory accelerator reads the rows of [B, G, Lk, D] by."""
    rows, dim = packed.shape[:3].numel(), packed.shape[3]
    return _pieces(packed.dtype, rows, dim).of(packed)


@functools.lru_cache(maxsize=1024)
def _pieces(dtype: torch.dtype, rows: int, dim: int) -> launcher.Pieces:
    from triton.experimental.gluon import language as gl

    return launcher.Pieces(dtype, [rows, dim], [dim, 1], [BLOCK, dim], gl.NVMMASharedLayout(128, 16, 2))
