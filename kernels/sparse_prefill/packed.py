"""Engine `packed`: kept rows to contiguous storage, a vendor's dense attention, rows back to their places."""

from __future__ import annotations

import torch

from tsa_compile.kernels.sparse_prefill.engines import InnerEngine, find_inner
from tsa_compile.kernels.sparse_prefill.strip import add_strip, invert, rank_order

Tensor = torch.Tensor
CHUNK_BYTES = 1 << 30  # packed q, k, v and output of the heads that run together
TAIL = 256  # finite rows behind the last: the widest key tile of the inner engines


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    heavy_indices: Tensor,
    key_mask: Tensor | None,
    scale: float,
    strip_window: int,
    strip_sinks: int,
    inner: InnerEngine | None = None,
) -> Tensor:
    """`sparse_attention` (host.py) for CUDA tensors, in chunks of heads. `inner` None: the fastest that is there.

    Raises:
        ValueError: `Lq < Lk`: heads then keep different numbers of queries, which dense engines do not take.
        RuntimeError: no inner engine can run the call.
    """
    (batch, heads, q_len, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    if q_len != k_len:
        raise ValueError(f"engine 'packed' needs as many queries as keys, not {q_len} and {k_len}; use 'fused'")
    inner = inner or find_inner(q, v)
    strip = strip_window > 0 or strip_sinks > 0 or heavy_indices.shape[-1] > 0
    slots = invert(indices, counts)
    order = rank_order(key_mask) if strip and key_mask is not None else None
    out = q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)
    step = kv_heads_per_chunk(q, k, v, indices.shape[1])
    for first in range(0, kv_heads, step):
        q_c, k_c, v_c, out_c, slots_c, indices_c, heavy_c = (
            x[:, first * x.shape[1] // kv_heads : (first + step) * x.shape[1] // kv_heads]
            for x in (q, k, v, out, slots, indices, heavy_indices)
        )
        packed = pack(q_c, k_c, v_c, indices_c, counts)
        part, lse = inner.attend(*packed, counts, scale, strip)
        del packed
        if strip:
            add_strip(q_c, k_c, v_c, out_c, part, lse, slots_c, heavy_c, order, scale, strip_window, strip_sinks)
        else:
            scatter(part, out_c, slots_c)
        del part, lse  # before the next chunk allocates
    return out


def kv_heads_per_chunk(q: Tensor, k: Tensor, v: Tensor, lists: int) -> int:
    """Largest divisor of Hk whose packed rows fit CHUNK_BYTES; at least 1."""
    kv_heads = k.shape[1]
    row = (q.shape[1] + lists) * (q.shape[-1] + v.shape[-1]) * q.element_size()
    chunks = (d for d in range(1, kv_heads + 1) if kv_heads % d == 0)
    return kv_heads // next((d for d in chunks if q.shape[0] * k.shape[2] * row <= CHUNK_BYTES * d), kv_heads)


def pack(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept rows of q per head, of k and v per list: [B, H, Lk, D], [B, G, Lk, D], [B, G, Lk, Dv], counts[b] rows used."""
    import triton

    from tsa_compile.kernels.sparse_prefill.pack_device import pack_kernel

    (batch, heads, _, dim), (kv_heads, k_len), v_dim, lists = q.shape, k.shape[1:3], v.shape[-1], indices.shape[1]
    packed = tuple(q.new_empty(batch, h, k_len, d) for h, d in ((heads, dim), (lists, dim), (lists, v_dim)))
    pack_kernel[(batch * heads, triton.cdiv(k_len, 64))](
        q, k, v, *packed, indices, counts,
        *q.stride(), *k.stride(), *v.stride(), *indices.stride()[:2], heads, kv_heads, lists, k_len,
        D=dim, DV=v_dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_DV=triton.next_power_of_2(v_dim),
        BLOCK=64, TAIL=TAIL,
    )  # fmt: skip
    return packed  # type: ignore[return-value]


def scatter(part: Tensor, out: Tensor, slots: Tensor) -> None:
    """Every row of out [B, H, Lq, Dv]: the packed row of its slot, or zero."""
    import triton

    from tsa_compile.kernels.sparse_prefill.pack_device import scatter_kernel

    batch, heads, q_len, v_dim = out.shape
    scatter_kernel[(batch * heads, triton.cdiv(q_len, 64))](
        part, out, slots, *part.stride()[:3], *out.stride()[:3], *slots.stride()[:2], heads, slots.shape[1], q_len,
        DV=v_dim, BLOCK_DV=triton.next_power_of_2(v_dim), BLOCK=64,
    )  # fmt: skip
