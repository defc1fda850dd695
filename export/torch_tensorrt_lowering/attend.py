"""`tsa::sparse_attention`, `token_sparse_attention` and `key_attention` in core operators (docs/operators.md).

The number of kept tokens is read from `counts` as a size, so scores are as large as what is kept, not as the sequence.
"""

from __future__ import annotations

import torch

from tsa_compile.export.common import ExportError
from tsa_compile.export.torch_tensorrt_lowering.kept import Attended, Kept, for_heads, kept_size
from tsa_compile.export.torch_tensorrt_lowering.padding import attend_padding
from tsa_compile.export.torch_tensorrt_lowering.rows import HIDDEN, Rows, take
from tsa_compile.export.torch_tensorrt_lowering.select import key_view, select_tokens
from tsa_compile.export.torch_tensorrt_lowering.strip import complete
from tsa_compile.kernels.common.results import no_lse
from tsa_compile.kernels.types import Strip

Tensor = torch.Tensor


def token_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, coverage: float, window: int, pool: int,
    min_tokens: int, strip_window: int, strip_sinks: int, heavy: int, engine: str,
) -> Tensor:  # fmt: skip
    """Selection and attention in one, `[B, H, Lq, Dv]`; rows of padding are zero."""
    order, ranks = (None, None) if key_mask is None else key_view(key_mask)
    chosen = select_tokens(q, k, order, ranks, scale, coverage, window, pool, min_tokens, heavy)
    rows = Rows(q, k, order, ranks)
    return stored(_attend(rows, ranks, (q, k, v), chosen, scale, Strip(strip_window, strip_sinks)).to(q.dtype))


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, heavy_indices: Tensor, order: Tensor | None,
    ranks: Tensor | None, scale: float, strip_window: int, strip_sinks: int, dense_below: int, engine: str,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[B, H, Lq, Dv]`, no log-sum-exp).

    Raises:
        ExportError: `need_lse`.
    """
    no_lse_wanted("sparse_attention", need_lse)
    rows = Rows(q, k, order, ranks)
    kept = (indices, counts, heavy_indices)
    out = _attend(rows, ranks, (q, k, v), kept, scale, Strip(strip_window, strip_sinks)).to(q.dtype)
    return stored(attend_padding(rows, q, k, v, scale, out)), no_lse(q)


def _attend(
    rows: Rows, ranks: Tensor | None, qkv: tuple[Tensor, Tensor, Tensor], chosen: tuple[Tensor, Tensor, Tensor], scale: float,
    strip: Strip,
) -> Tensor:  # fmt: skip
    """`[B, H, Lq, Dv]`, zero in rows of padding. chosen: the results of `select_tokens`."""
    indices, counts, heavy_indices = chosen
    kept = Kept.of(rows, ranks, indices, counts)
    completed = strip.reads(heavy_indices)
    attended = _attend_kept(rows, kept, *qkv, scale, with_lse=completed)
    if completed:
        heavy = kept.ranks_of(rows, ranks, for_heads(heavy_indices, rows.heads))
        return complete(rows, kept, attended, qkv, heavy, strip, scale)
    selected, row = attended.row_of(rows, kept, rows.query_rank)
    if rows.real_query is not None:
        selected = selected & rows.real_query[:, None, :, None]
    return torch.where(selected, take(attended.out, row, rows.heads), 0.0)


def _attend_kept(rows: Rows, kept: Kept, q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool) -> Attended:
    """Causal attention among each head's kept tokens."""
    place = torch.arange(kept.size, device=q.device)
    if rows.all_queries:
        first, slot, rank = torch.zeros_like(kept.slots[:, :, :1]), place[None, None], kept.tokens
    else:
        early = (kept.slots >= 0) & (rows.column < rows.first_query[..., None])
        first = early.long().sum(2, keepdim=True)
        slot = (first + torch.arange(torch.sym_min(kept.size, rows.q_len), device=q.device)).minimum(place[-1:])
        rank = take(kept.tokens[..., None], slot, rows.heads)[..., 0]
    at = rows.position(kept.tokens)
    keys, values = take(k, at, rows.heads), take(v, at, rows.heads)
    scores = (rows.query_rows(q, rank) @ keys.transpose(2, 3)).float() * scale
    scores = torch.where(place > slot[..., None], HIDDEN, scores)
    out = scores.softmax(-1).to(v.dtype) @ values
    return Attended(first, out, _log_sum_exp(scores) if with_lse else None)


def _log_sum_exp(scores: Tensor) -> Tensor:
    """Natural log of the sum of exponentials along the last dimension, kept as 1."""
    top = scores.amax(-1, keepdim=True)
    return top + (scores - top).exp().sum(-1, keepdim=True).log()


def key_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float, need_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """(out `[B, H, Lq, Dv]`, no log-sum-exp): every query reads the kept keys.

    Raises:
        ExportError: `need_lse`.
    """
    no_lse_wanted("key_attention", need_lse)
    size, heads = kept_size(counts, k.shape[2]), q.shape[1]
    place = torch.arange(size, device=q.device)
    at = for_heads(indices, heads).index_select(2, place).long().clamp(min=0)
    keys, values = take(k, at, heads), take(v, at, heads)
    unused = place >= counts[:, None]
    scores = torch.where(unused[:, None, None], HIDDEN, (q @ keys.transpose(2, 3)).float() * scale)
    out = scores.softmax(-1).to(v.dtype) @ values
    return stored(torch.where(counts[:, None, None, None] > 0, out, 0.0).to(q.dtype)), no_lse(q)


def stored(out: Tensor) -> Tensor:
    """`[B, H, Lq, Dv]`, stored as `[B, Lq, H, Dv]`: what follows may view it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def no_lse_wanted(name: str, need_lse: bool) -> None:
    if need_lse:
        raise ExportError(f"tsa::{name}: its log-sum-exp is read; its lowering gives the attention's output alone")
