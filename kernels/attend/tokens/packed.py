"""Engine `packed`: kept keys and values go to contiguous storage, so that attention reads them as whole tiles.

On Hopper this project's kernel reads them there, takes queries from their places and puts results to theirs. Elsewhere, and for
head dims that it does not take, a vendor's dense attention runs on packed queries, and its rows go back.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.tokens import hopper
from tsa_compile.kernels.attend.tokens.chunks import chunks, kv_heads_per_chunk, pack, scatter
from tsa_compile.kernels.attend.tokens.engines import InnerEngine, find_inner
from tsa_compile.kernels.attend.tokens.strip import add_strip, invert
from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.types import Attended, Operands, Strip, Tokens

Tensor = torch.Tensor


def packed_attention(
    x: Operands, kept: Tokens, scale: float, strip: Strip, need_lse: bool = False, inner: InnerEngine | None = None
) -> Attended:
    """`sparse_attention` (host.py) for CUDA tensors, in chunks of heads. `inner` None: the fastest that is there.

    Raises:
        ValueError: `Lq < Lk`, and dense attention is to run: heads then keep different numbers of queries.
        RuntimeError: nothing can run the call.
    """
    q, k, v = x.q, x.k, x.v
    q_len, (kv_heads, k_len), lists = q.shape[2], k.shape[1:3], kept.indices.shape[1]
    own = inner is None and hopper.takes(q, k, v)
    if not own and q_len != k_len and not (inner is not None and inner.chunks):
        raise ValueError(f"engine 'packed' needs as many queries as keys, not {q_len} and {k_len}; use 'fused'")
    inner = None if own else inner or find_inner(q, v)
    has_strip = strip.reads(kept.heavy_indices)
    slots = invert(kept.indices, kept.counts) if has_strip or not own else kept.indices  # not read: results are in their places
    out = empty_result(q, v)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if need_lse else no_lse(q)
    if out.numel() == 0:
        return Attended(out, lse.fill_(-torch.inf))
    step = kv_heads_per_chunk(k, packed_bytes(q, k, v, lists, own))
    by_head = (q, k, v, out, lse if need_lse else out, slots, kept.indices, kept.heavy_indices)
    for q_c, k_c, v_c, out_c, lse_c, slots_c, indices_c, heavy_c in chunks(kv_heads, step, *by_head):
        part_x, part_kept = x._replace(q=q_c, k=k_c, v=v_c), Tokens(indices_c, kept.counts, heavy_c)
        if inner is None:
            part = attend_packed_keys(part_x, part_kept, out_c, scale, has_strip, need_lse)
        else:
            packed = pack_all(q_c, k_c, v_c, indices_c, kept.counts)
            part = Attended(*inner.attend(*packed, kept.counts, scale, has_strip or need_lse))
        part_lse: Tensor | None = part.lse
        if has_strip:
            part_lse = add_strip(part_x, out_c, part, slots_c, heavy_c, strip, scale, need_lse)
        elif inner is not None:
            of_rows = slots_c[..., k_len - q_len :]
            scatter(part.out, out_c, of_rows)
            part_lse = lse_by_row(part.lse, of_rows) if need_lse else None
        if need_lse and part_lse is not None:
            lse_c.copy_(part_lse)
        del part, part_lse  # before the next chunk allocates
    return Attended(out, lse)


def lse_by_row(lse: Tensor, slots: Tensor) -> Tensor:
    """Log-sum-exps `[B, H, Lk]` by slot -> by row; -inf where slots `[B, G, Lq]` is -1."""
    slots = slots.repeat_interleave(lse.shape[1] // slots.shape[1], 1).long()
    return torch.where(slots >= 0, lse.gather(2, slots.clamp(min=0)), -torch.inf)


def packed_bytes(q: Tensor, k: Tensor, v: Tensor, lists: int, own: bool) -> int:
    """Bytes of packed rows a token, over all heads: keys and values, and for dense attention queries and results."""
    return (lists if own else lists + q.shape[1]) * (k.shape[-1] + v.shape[-1]) * k.element_size()


def attend_packed_keys(x: Operands, kept: Tokens, out: Tensor, scale: float, has_strip: bool, need_lse: bool) -> Attended:
    """Attention among the kept tokens into `out`, and the log-sum-exp by row, or None if nothing needs it.

    Where it is needed and no strip comes after it, the rows that are not kept are written here (see `fused.new_result`).
    """
    lists, lse = kept.indices.shape[1], None
    keys, values = pack(x.k, lists, kept.indices, kept.counts), pack(x.v, lists, kept.indices, kept.counts)
    if has_strip or need_lse:
        lse = torch.empty(x.q.shape[:3], dtype=torch.float32, device=x.q.device)
    if lse is not None and not has_strip:
        out.zero_()
        lse.fill_(-torch.inf)
    hopper.launch(x.q, keys, values, out, lse, kept.indices, kept.counts, scale, packed=True)
    return Attended(out, lse)


def pack_all(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kept rows of q per head, of k and v per list: [B, H, Lk, D], [B, G, Lk, D], [B, G, Lk, Dv], counts[b] rows used."""
    lists = indices.shape[1]
    return pack(q, q.shape[1], indices, counts), pack(k, lists, indices, counts), pack(v, lists, indices, counts)
