"""Which tokens each head keeps (docs/operators.md, `select_tokens`), as standard ONNX operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tsa_compile.export.onnx_model.body_call import HIDDEN, Call
from tsa_compile.export.onnx_model.emitter import FLOAT, INT64

if TYPE_CHECKING:
    import onnx_ir as ir

    from tsa_compile.export.onnx_model.body_rank import Ranking


class Kept(NamedTuple):
    """What was kept, in ranks.

    slots: [B, H, Lk] place of each token in its head's list, -1 if it is not kept.
    tokens: [B, H, n] the lists, ascending; n is the longest row's count.
    heavy: [B, H, heavy] the heaviest tokens, ascending; only the first `heavy_count` [B, 1] of a row are used.
        None: not asked.
    """

    slots: ir.Value
    tokens: ir.Value
    heavy: ir.Value | None
    heavy_count: ir.Value | None


def select_tokens(call: Call, ranking: Ranking, with_heavy: bool) -> Kept:
    """Steps 1 to 7 of the contract."""
    op = call.op
    last_queries, min_tokens = op.attribute("window", "int"), op.attribute("min_tokens", "int")
    before = op.Max(op.Sub(call.length, last_queries), 0)  # [B, 1] tokens before the last queries
    candidate = op.Less(call.column, before)  # [B, Lk]
    score = _pool(call, op.Where(op.Unsqueeze(candidate, [1]), call.by_rank(_last_query_scores(call, last_queries)), 0.0))
    units = op.Cast(op.Mul(score, float(2**52)), to=INT64)
    units = op.Where(candidate, op.ReduceSum(units, [1], keepdims=0), 0)  # [B, Lk]
    n_drop = ranking.dropped(call, units, candidate)  # [B, 1]
    short = op.LessOrEqual(call.length, op.Add(min_tokens, last_queries))
    all_kept = op.Or(short, op.Equal(n_drop, 0))
    n_keep = op.Where(all_kept, before, op.Max(min_tokens, op.Sub(op.Sub(before, n_drop), 1)))
    score = op.Where(op.Unsqueeze(candidate, [1]), score, -1.0)
    top = ranking.largest(call, score, op.Unsqueeze(n_keep, [2]))
    of_last = op.And(op.GreaterOrEqual(call.column, before), op.Less(call.column, call.length))
    slots = _slots(call, op.Or(top, op.Unsqueeze(of_last, [1])))
    count = op.Add(n_keep, op.Min(last_queries, call.length))
    capacity = op.Max(op.ReduceMax(op.Reshape(count, [-1]), [0], keepdims=1), 1)  # 1: no empty tensors
    tokens = call.compact(slots, capacity, axis=2)
    if not with_heavy:
        return Kept(slots, tokens, None, None)
    heavy = op.Reshape(op.attribute("heavy", "int"), [1])
    heavy_count = op.Min(before, heavy)
    heaviest = ranking.largest(call, score, op.Unsqueeze(heavy_count, [2]))
    return Kept(slots, tokens, call.compact(_slots(call, heaviest), heavy, axis=2), heavy_count)


def _last_query_scores(call: Call, last_queries: ir.Value) -> ir.Value:
    """Mean attention of the last queries to every key, float32 [B, H, Lk], by position."""
    op = call.op
    step = call.range(op.Reshape(last_queries, [1]))
    rank = op.Add(op.Sub(call.length, last_queries), step)  # [B, W]
    counted = op.GreaterOrEqual(rank, op.Max(call.first_query, 0))
    position = call.position(call.clip(op.Expand(rank, call.shape(call.batch, 1)), call.k_len))
    q = call.query_rows(op.Unsqueeze(rank, [1]))
    q = op.Reshape(op.Cast(q, to=FLOAT), call.shape(call.batch, call.kv_heads, -1, call.dim))
    scores = call.scores(q, op.Cast(call.k, to=FLOAT), perm=[0, 1, 3, 2])
    scores = op.Reshape(scores, call.shape(call.batch, call.heads, op.Reshape(last_queries, [1]), call.k_len))
    visible = op.LessOrEqual(call.column, op.Unsqueeze(position, [1, 3]))
    if call.key_mask is not None:
        visible = op.And(visible, op.Unsqueeze(call.key_mask, [1, 2]))
    weights = op.Softmax(op.Where(visible, scores, HIDDEN), axis=-1)
    total = op.ReduceSum(op.Where(op.Unsqueeze(counted, [1, 3]), weights, 0.0), [2], keepdims=0)
    queries = op.Max(op.ReduceSum(op.Cast(counted, to=FLOAT), [1], keepdims=1), 1.0)
    return op.Div(total, op.Unsqueeze(queries, [2]))


def _pool(call: Call, x: ir.Value) -> ir.Value:
    """Average over `pool` neighbours along the last axis of x [B, H, Lk]; outside counts as zero.

    An average is at most 1, or not finite (NaN or infinity in q or k), which counts as zero.
    """
    op = call.op
    pool = op.attribute("pool", "int")
    step = op.Sub(op.Range(0, pool, 1), op.Div(pool, 2))
    index = op.Add(op.Unsqueeze(call.column, [1]), step)  # [Lk, pool]
    inside = op.And(op.GreaterOrEqual(index, 0), op.Less(index, call.k_len))
    near = op.Where(inside, op.Gather(x, call.clip(index, call.k_len), axis=2), 0.0)
    mean = op.Div(op.ReduceSum(near, [3], keepdims=0), op.Cast(pool, to=FLOAT))
    return op.Where(op.Less(mean, 2.0), mean, 0.0)


def _slots(call: Call, member: ir.Value) -> ir.Value:
    """[B, H, Lk] bool -> its members numbered from 0, -1 elsewhere."""
    op = call.op
    return op.Where(member, op.Sub(op.CumSum(op.Cast(member, to=INT64), 2), 1), -1)
