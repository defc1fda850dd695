"""Heads that engine `packed` takes together, so that its storage stays small; and the storage."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tsa_compile.kernels.common.launch import tiles_in_yz
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2

Tensor = torch.Tensor
CHUNK_BYTES = 1 << 30  # packed rows, and what else is kept by row, of the heads that run together
TAIL = 256  # finite rows behind the last: the widest key tile of the inner engines


def kv_heads_per_chunk(k: Tensor, token_bytes: int) -> int:
    """Largest divisor of Hk whose share of `token_bytes` a token of k [B, Hk, Lk, D] fits CHUNK_BYTES; at least 1."""
    batch, kv_heads, k_len, _ = k.shape
    chunks = (d for d in range(1, kv_heads + 1) if kv_heads % d == 0)
    return kv_heads // next((d for d in chunks if batch * k_len * token_bytes <= CHUNK_BYTES * d), kv_heads)


def chunks(kv_heads: int, step: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of tensors [B, heads or lists, ...] that belong to `step` KV heads each."""
    for first in range(0, kv_heads, step):
        yield tuple(x[:, first * x.shape[1] // kv_heads : (first + step) * x.shape[1] // kv_heads] for x in tensors)


def pack(x: Tensor, packed_heads: int, indices: Tensor, counts: Tensor) -> Tensor:
    """Kept rows of x [B, heads, L, D] by lists [B, G, Lk] -> [B, packed_heads, Lk, D], counts[b] rows used.

    x holds the last L of the Lk positions; a kept row before them is zero.
    """
    from tsa_compile.kernels.attend.tokens.pack_device import pack_kernel

    (batch, heads, length, dim), k_len = x.shape, indices.shape[2]
    skipped = k_len - length
    packed = x.new_empty(batch, packed_heads, k_len, dim)
    launch(
        pack_kernel, (batch * packed_heads, *tiles_in_yz(cdiv(k_len, 64))), (x, packed, indices, counts),
        (*x.stride(), *indices.stride()[:2], heads, packed_heads, indices.shape[1], k_len, skipped),
        D=dim, BLOCK_D=next_power_of_2(dim), BLOCK=64, TAIL=TAIL,
    )  # fmt: skip
    return packed


def scatter(part: Tensor, out: Tensor, slots: Tensor) -> None:
    """Every row of out [B, H, Lq, Dv]: the packed row of its slot, or zero."""
    from tsa_compile.kernels.attend.tokens.pack_device import scatter_kernel

    batch, heads, q_len, v_dim = out.shape
    launch(
        scatter_kernel, (batch * heads, *tiles_in_yz(cdiv(q_len, 64))), (part, out, slots),
        (*part.stride()[:3], *out.stride()[:3], *slots.stride()[:2], heads, slots.shape[1], q_len),
        DV=v_dim, BLOCK_DV=next_power_of_2(v_dim), BLOCK=64,
    )  # fmt: skip
