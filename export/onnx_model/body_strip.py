"""The completion strip: every row reads its local window, the sinks and its head's heaviest tokens (docs/operators.md).

Rows are taken in blocks of `strip_window`, so each block reads two blocks of keys: memory is linear in the length. The
strip is merged with the attention among the kept tokens through their maxima and sums; keys in both parts count once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tsa_compile.export.onnx_model.body_attend import Attended, row_of
from tsa_compile.export.onnx_model.body_call import HIDDEN, Call
from tsa_compile.export.onnx_model.body_select import Kept
from tsa_compile.export.onnx_model.emitter import FLOAT

if TYPE_CHECKING:
    import onnx_ir as ir


class _Rows(NamedTuple):
    """Query rows in blocks: `blocks` blocks of `block` rows; row t is the query of rank first_query + t.

    rank: [B, rows]; q: [B, H, rows, D]; selected: [B, H, rows, 1] bool; slot: [B, H, rows] its row in Attended.
    """

    block: ir.Value
    blocks: ir.Value
    rank: ir.Value
    q: ir.Value
    selected: ir.Value
    slot: ir.Value


def complete(call: Call, kept: Kept, attended: Attended) -> ir.Value:
    """[B, H, Lq, Dv]: the strip for every row, one softmax with the kept tokens for rows that are kept."""
    op = call.op
    rows = _rows(call, kept, attended)
    near, near_v = _near(call, kept, rows)
    far, far_v = _far(call, kept, rows)
    width = op.Shape(near, start=3, end=4)
    scores = op.Concat(near, far, axis=3)
    top = op.ReduceMax(scores, [3], keepdims=1)
    weights = op.Where(op.LessOrEqual(scores, HIDDEN / 2), 0.0, op.Exp(op.Sub(scores, top)))  # NaN stays
    total = op.ReduceSum(weights, [3], keepdims=1)
    end = op.Shape(weights, start=3, end=4)
    local = _times_near(call, rows, op.Slice(weights, [0], width, [3]), near_v)
    distant = op.MatMul(op.CastLike(op.Slice(weights, width, end, [3]), far_v), far_v)
    strip = op.Add(op.Cast(local, to=FLOAT), op.Cast(distant, to=FLOAT))
    return _in_order(call, rows, _merge(call, rows, attended, top, total, strip))


def _rows(call: Call, kept: Kept, attended: Attended) -> _Rows:
    op = call.op
    block = op.Max(op.Reshape(op.attribute("strip_window", "int"), [1]), 1)
    count = op.Div(op.Sub(op.Add(call.q_len, block), 1), block)
    step = call.range(op.Mul(count, block))
    rank = op.Expand(op.Add(call.first_query, step), call.shape(call.batch, 1))
    selected, slot = row_of(call, kept, attended, rank)
    return _Rows(block, count, rank, call.query_rows(op.Unsqueeze(rank, [1])), selected, slot)


def _near(call: Call, kept: Kept, rows: _Rows) -> tuple[ir.Value, ir.Value]:
    """Scores and values of the local window.

    Returns scores [B, H, rows, 2 * block], HIDDEN where a key is not read, and V [B, Hk, 1, blocks, 2 * block, Dv].
    """
    op = call.op
    block, blocks = rows.block, rows.blocks
    width = op.Mul(block, 2)
    start = op.Sub(op.Mul(call.range(blocks), block), block)
    index = op.Add(op.Unsqueeze(start, [1]), call.range(width))  # [blocks, width], from the first query
    flat = op.Add(call.first_query, op.Reshape(index, [1, -1]))
    rank = op.Expand(flat, call.shape(call.batch, 1))
    position = op.Unsqueeze(call.position(call.clip(rank, call.k_len)), [1])
    k, v = (
        op.Reshape(call.rows(x, call.kv_heads, position), call.shape(call.batch, call.kv_heads, 1, blocks, width, e))
        for x, e in ((call.k, call.dim), (call.v, call.v_dim))
    )
    q = op.Reshape(rows.q, call.shape(call.batch, call.kv_heads, call.group, blocks, block, call.dim))
    scores = call.scores(q, k, perm=[0, 1, 2, 3, 5, 4])
    blocked = call.shape(call.batch, call.heads, blocks, block, width)
    i, j = op.Unsqueeze(call.range(block), [1]), op.Sub(call.range(width), block)
    window = op.attribute("strip_window", "int")
    local = op.And(op.LessOrEqual(j, i), op.Greater(j, op.Sub(i, window)))  # [block, width]
    exists = op.Reshape(op.GreaterOrEqual(rank, 0), call.shape(call.batch, 1, blocks, 1, width))
    member = op.GatherElements(kept.slots, call.per_head(call.clip(rank, call.k_len)), axis=2)
    member = op.Reshape(op.GreaterOrEqual(member, 0), call.shape(call.batch, call.heads, blocks, 1, width))
    selected = op.Reshape(rows.selected, call.shape(call.batch, call.heads, blocks, block, 1))
    read = op.And(op.And(local, exists), op.Not(op.And(selected, member)))
    scores = op.Where(read, op.Reshape(scores, blocked), HIDDEN)
    return op.Reshape(scores, call.shape(call.batch, call.heads, -1, width)), v


def _far(call: Call, kept: Kept, rows: _Rows) -> tuple[ir.Value, ir.Value]:
    """Scores [B, H, rows, sinks + heavy], HIDDEN where a key is not read, and V [B, H, sinks + heavy, Dv]."""
    op = call.op
    sinks, heavy = (op.Reshape(op.attribute(name, "int"), [1]) for name in ("strip_sinks", "heavy"))
    ones = call.shape(call.batch, call.heads, 1)
    rank = op.Concat(op.Expand(call.range(sinks), ones), kept.heavy, axis=2)
    place = call.range(op.Add(sinks, heavy))
    used = op.Less(op.Sub(place, sinks), op.Unsqueeze(kept.heavy_count, [2]))
    once = op.Or(op.Less(place, sinks), op.GreaterOrEqual(rank, sinks))  # a heavy sink is read as a sink
    at = call.clip(rank, call.k_len)
    member = op.GreaterOrEqual(op.GatherElements(kept.slots, at, axis=2), 0)
    position = call.position(at)
    k, v = (call.rows(x, call.heads, position) for x in (call.k, call.v))
    scores = call.scores(rows.q, k, perm=[0, 1, 3, 2])
    behind = op.Sub(op.Unsqueeze(rows.rank, [1, 3]), op.attribute("strip_window", "int"))
    read = op.And(op.LessOrEqual(op.Unsqueeze(rank, [2]), behind), op.Unsqueeze(op.And(used, once), [2]))
    read = op.And(read, op.Not(op.And(rows.selected, op.Unsqueeze(member, [2]))))
    return op.Where(read, scores, HIDDEN), v


def _times_near(call: Call, rows: _Rows, weights: ir.Value, v: ir.Value) -> ir.Value:
    """weights [B, H, rows, 2 * block] times the blocks of V -> [B, H, rows, Dv]."""
    op = call.op
    blocked = call.shape(call.batch, call.kv_heads, call.group, rows.blocks, rows.block, op.Mul(rows.block, 2))
    out = op.MatMul(op.CastLike(op.Reshape(weights, blocked), v), v)
    return op.Reshape(out, call.shape(call.batch, call.heads, -1, call.v_dim))


def _merge(call: Call, rows: _Rows, attended: Attended, top: ir.Value, total: ir.Value, strip: ir.Value) -> ir.Value:
    """One softmax over both parts; float32 [B, H, rows, Dv]. A row without any key is zero."""
    op = call.op
    row_top = op.ReduceMax(attended.scores, [3], keepdims=1)
    row_total = op.ReduceSum(op.Exp(op.Sub(attended.scores, row_top)), [3], keepdims=1)
    by_row = (call.rows(x, call.heads, rows.slot) for x in (attended.out, row_top, row_total))
    out, kept_top, kept_total = (op.Cast(x, to=FLOAT) for x in by_row)
    kept_top = op.Where(rows.selected, kept_top, HIDDEN)
    highest = op.Max(top, kept_top)
    kept_share = op.Where(rows.selected, op.Mul(kept_total, op.Exp(op.Sub(kept_top, highest))), 0.0)
    strip_share = op.Exp(op.Sub(top, highest))
    total = op.Add(op.Mul(total, strip_share), kept_share)
    out = op.Add(op.Mul(strip, strip_share), op.Mul(out, kept_share))
    return op.Div(out, op.Where(op.Greater(total, 0.0), total, 1.0))


def _in_order(call: Call, rows: _Rows, out: ir.Value) -> ir.Value:
    """Rows by rank -> by query position; padding gets zero."""
    op = call.op
    if call.real_query is None:
        return op.CastLike(op.Slice(out, [0], call.q_len, [2]), call.q)
    at = call.clip(op.Sub(call.query_rank, call.first_query), call.q_len)
    out = call.rows(out, call.heads, op.Unsqueeze(at, [1]))
    return op.CastLike(op.Where(call.real_query, out, 0.0), call.q)
