"""`tsa::key_view`, `select_tokens` and `select_keys` in core operators (docs/operators.md)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsa_compile.export.torch_tensorrt_lowering.rank import dropped, largest
from tsa_compile.export.torch_tensorrt_lowering.rows import HIDDEN, Rows, Size, compact, look_up, number, running_sum, take
from tsa_compile.kernels.types import TokenRule

Tensor = torch.Tensor


def key_view(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(order, ranks), int32 `[B, Lk]`, of a bool key mask `[B, Lk]`."""
    ranks = running_sum(key_mask)
    column = torch.arange(key_mask.shape[1], device=key_mask.device)
    place = torch.where(key_mask, ranks - 1, ranks.amax(1, keepdim=True) + column - ranks)
    order = torch.zeros_like(place).scatter(1, place, column + torch.zeros_like(place))
    return order.int(), ranks.int()


def select_tokens(
    q: Tensor, k: Tensor, order: Tensor | None, ranks: Tensor | None, scale: float, coverage: float, window: int, pool: int,
    min_tokens: int, heavy: int, *, share: str = "head", min_queries: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kept tokens of every list: (indices `[B, G, Lk]`, counts `[B]`, heavy_indices `[B, G, heavy]`), int32."""
    rows = Rows(q, k, order, ranks)
    few = None
    if min_queries and not rows.all_queries:
        q_len, k_len = number(rows.q_len, q.device), number(rows.k_len, q.device)
        few = (q_len <= min_queries) & (q_len < k_len)
    rule = TokenRule(coverage, window, pool, min_tokens, heavy)
    mean = last_query_scores(rows, q, k, scale, window) if coverage else q.new_zeros(q.shape[0], q.shape[1], k.shape[2])
    return choose(rows, mean.float(), rule, rows.heads if share == "head" else rows.kv_heads, few)


def select_keys(
    q: Tensor, k: Tensor, order: Tensor | None, ranks: Tensor | None, scale: float, coverage: float, probes: int, min_keys: int
) -> tuple[Tensor, Tensor]:
    """Kept keys of every head: (indices `[B, H, Lk]`, counts `[B]`), int32."""
    rows = Rows(q, k, order, ranks) if k.shape[2] == q.shape[2] else Rows(k, k, order, ranks)
    own = rows.padded and k.shape[2] == q.shape[2]
    queries = rows.length if own else number(q.shape[2], q.device)
    step = torch.arange(probes, device=q.device)
    rank = (2 * step + 1) * queries // (2 * probes)  # [b, probes]
    at = rows.position(rank[:, None]) if own else rank[:, None]
    probing = take(q, at, q.shape[1])
    hidden = None if rows.real is None else ~rows.real[:, None, None]
    mean = _weights(probing, k, scale, hidden).mean(2)
    indices, counts, _ = choose(rows, mean, TokenRule(coverage, 1, 1, min_keys), q.shape[1], None)
    return indices, counts


def last_query_scores(rows: Rows, q: Tensor, k: Tensor, scale: float, last_queries: int) -> Tensor:
    """Mean attention of the last queries to every key, float32 `[B, H, Lk]`, by position."""
    rank = rows.length - last_queries + torch.arange(last_queries, device=q.device)  # [b, W]
    counted = rank >= rows.first_query.clamp(min=0)
    position = rows.position(rank[:, None])[:, 0]
    hidden = (rows.column > position[..., None])[:, None]
    if rows.real is not None:
        hidden = hidden | ~rows.real[:, None, None]
    weights = _weights(rows.query_rows(q, rank[:, None]), k, scale, hidden)
    total = torch.where(counted[:, None, :, None], weights, 0.0).sum(2)
    return total / counted.float().sum(1).clamp(min=1)[:, None, None]


def _weights(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """softmax(scale * q k^T), float32. q `[B, H, m, D]`, k `[B, Hk, Lk, D]` -> `[B, H, m, Lk]`."""
    batch, heads, m, dim = q.shape
    grouped = q.float().reshape(batch, k.shape[1], -1, dim)
    scores = (grouped @ k.float().transpose(2, 3) * scale).reshape(batch, heads, m, k.shape[2])
    return (scores if hidden is None else torch.where(hidden, HIDDEN, scores)).softmax(-1)


def choose(rows: Rows, mean: Tensor, rule: TokenRule, lists: Size, few: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 3 (pooling) to 7 of the contract, from the mean attention float32 `[B, H, Lk]` by position.

    few: bool `[1, 1]`, whether so few queries ask that every key is kept.
    """
    before = (rows.length - rule.last_queries).clamp(min=0)  # [b, 1] tokens before the last queries
    candidate = rows.column < before  # [b, Lk], by rank
    if rows.padded:
        mean = look_up(mean, rows.positions[:, None])
    score = pooled(torch.where(candidate[:, None], mean, 0.0), rule.pool)
    score = torch.where((score >= 0) & (score <= 2), score, 0.0)
    units = (score * 2.0**52).long().sum(1) * candidate.long()  # no `where`: rank.py
    n_drop = dropped(units, candidate, rule.coverage)  # [B, 1]
    everything = (n_drop == 0) | (rows.length <= rule.min_tokens + rule.last_queries)
    if few is not None:
        everything = everything | few
    n_keep = torch.where(everything, before, (before - n_drop - 1).clamp(min=rule.min_tokens))
    if lists is not rows.heads and lists != mean.shape[1]:
        score = score.unflatten(1, (lists, -1)).sum(2)
    score = torch.where(candidate[:, None], score, -1.0)
    of_last = (rows.column >= before) & (rows.column < rows.length)
    kept = largest(score, n_keep[:, None]) | of_last[:, None]
    positions = rows.positions[:, None]
    indices = compact(kept, positions, rows.k_len, lists).int()
    counts = (n_keep + rows.length - before)[:, 0].int()
    if rule.heavy == 0:
        return indices, counts, indices[:, :, :0]
    heaviest = largest(score, before.clamp(max=rule.heavy)[:, None]) & ~everything[:, None]
    return indices, counts, compact(heaviest, positions, rule.heavy, lists).int()


def pooled(x: Tensor, pool: int) -> Tensor:
    """Average over `pool` neighbours along the last dimension of x `[B, H, n]`; outside counts as zero."""
    return x if pool == 1 else F.avg_pool2d(x[:, None], (1, pool), stride=1, padding=(0, pool // 2))[:, 0]
