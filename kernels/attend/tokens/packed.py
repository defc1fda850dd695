"""Engine `packed`: kept keys and values go to contiguous storage, so that attention reads them as whole tiles.

On Hopper this project's kernel reads them there, takes queries from their places and puts results to theirs. Elsewhere, and for
head dims that it does not take, a vendor's dense attention runs on packed queries, and its rows go back.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.tokens import hopper
from tsa_compile.kernels.attend.tokens.chunks import chunks, kv_heads_per_chunk, pack, scatter
from tsa_compile.kernels.attend.tokens.engines import InnerEngine, find_inner
from tsa_compile.kernels.attend.tokens.strip import add_strip, invert, rank_order

Tensor = torch.Tensor


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
        ValueError: `Lq < Lk`, and dense attention is to run: heads then keep different numbers of queries.
        RuntimeError: nothing can run the call.
    """
    (batch, heads, q_len, _), (kv_heads, k_len), lists = q.shape, k.shape[1:3], indices.shape[1]
    own = inner is None and hopper.takes(q, k, v)
    if not own and q_len != k_len:
        raise ValueError(f"engine 'packed' needs as many queries as keys, not {q_len} and {k_len}; use 'fused'")
    inner = None if own else inner or find_inner(q, v)
    strip = strip_window > 0 or strip_sinks > 0 or heavy_indices.shape[-1] > 0
    slots = invert(indices, counts) if strip or not own else indices  # not read: results are in their places
    order = rank_order(key_mask) if strip and key_mask is not None else None
    out = q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)
    step = kv_heads_per_chunk(k, packed_bytes(q, k, v, lists, own))
    for q_c, k_c, v_c, out_c, slots_c, indices_c, heavy_c in chunks(kv_heads, step, q, k, v, out, slots, indices, heavy_indices):
        if inner is None:
            part, lse = attend_packed_keys(q_c, k_c, v_c, out_c, indices_c, counts, scale, strip)
        else:
            part, lse = inner.attend(*pack_all(q_c, k_c, v_c, indices_c, counts), counts, scale, strip)
        if strip:
            add_strip(q_c, k_c, v_c, out_c, part, lse, slots_c, heavy_c, order, scale, strip_window, strip_sinks)
        elif part is not out_c:
            scatter(part, out_c, slots_c)
        del part, lse  # before the next chunk allocates
    return out


def packed_bytes(q: Tensor, k: Tensor, v: Tensor, lists: int, own: bool) -> int:
    """Bytes of packed rows a token, over all heads: keys and values, and for dense attention queries and results."""
    return (lists if own else lists + q.shape[1]) * (k.shape[-1] + v.shape[-1]) * k.element_size()


def attend_packed_keys(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, indices: Tensor, counts: Tensor, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention among the kept tokens into `out`, and the log-sum-exp by row if asked for, as `fused.launch_prefill`."""
    lists = indices.shape[1]
    keys, values = pack(k, lists, indices, counts), pack(v, lists, indices, counts)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if need_lse else None
    hopper.launch(q, keys, values, out, lse, indices, counts, scale, packed=True)
    return out, lse


def pack_all(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept rows of q per head, of k and v per list: [B, H, Lk, D], [B, G, Lk, D], [B, G, Lk, Dv], counts[b] rows used."""
    lists = indices.shape[1]
    return pack(q, q.shape[1], indices, counts), pack(k, lists, indices, counts), pack(v, lists, indices, counts)
