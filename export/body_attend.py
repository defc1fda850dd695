"""Attention among the kept tokens, and the scatter to all rows (docs/operators.md, `sparse_attention`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tsa_compile.export.body_call import HIDDEN, Call
from tsa_compile.export.body_select import Kept
from tsa_compile.export.ops import INT64

if TYPE_CHECKING:
    import onnx_ir as ir


class Attended(NamedTuple):
    """Attention of the kept queries: row t of head h is its (first + t)-th kept token.

    first: [B, H, 1] kept tokens before the first query.
    size: [1] rows.
    out: [B, H, size, Dv] of the dtype of v, normalised.
    top, total: [B, H, size, 1] float32: the row's largest score, and the sum of exp(score - top); None if not asked.
    """

    first: ir.Value
    size: ir.Value
    out: ir.Value
    top: ir.Value | None
    total: ir.Value | None


def attend_kept(call: Call, kept: Kept, with_totals: bool) -> Attended:
    """Causal attention among each head's kept tokens."""
    op = call.op
    count = op.Shape(kept.tokens, start=2, end=3)
    size = op.Min(call.q_len, count)
    early = op.And(op.GreaterOrEqual(kept.slots, 0), op.Less(call.column, op.Unsqueeze(call.first_query, [2])))
    first = op.ReduceSum(op.Cast(early, to=INT64), [2], keepdims=1)
    slot = op.Min(op.Add(first, call.range(size)), op.Sub(count, 1))  # [B, H, size]
    q = call.query_rows(op.GatherElements(kept.tokens, slot, axis=2))
    position = call.position(kept.tokens)
    k, v = (call.rows(x, call.heads, position) for x in (call.k, call.v))
    causal = op.LessOrEqual(call.range(count), op.Unsqueeze(slot, [3]))
    scores = op.Where(causal, call.scores(q, k, perm=[0, 1, 3, 2]), HIDDEN)
    out = op.MatMul(op.CastLike(op.Softmax(scores, axis=-1), v), v)
    if not with_totals:
        return Attended(first, size, out, None, None)
    top = op.ReduceMax(scores, [3], keepdims=1)
    return Attended(first, size, out, top, op.ReduceSum(op.Exp(op.Sub(scores, top)), [3], keepdims=1))


def row_of(call: Call, kept: Kept, attended: Attended, rank: ir.Value) -> tuple[ir.Value, ir.Value]:
    """For queries at rank [B, n]: is it kept (bool [B, H, n, 1]), and its row in `attended` ([B, H, n], clipped)."""
    op = call.op
    slot = op.GatherElements(kept.slots, call.per_head(call.clip(rank, call.k_len)), axis=2)
    row = call.clip(op.Sub(slot, attended.first), attended.size)
    return op.Unsqueeze(op.GreaterOrEqual(slot, 0), [3]), row


def scatter(call: Call, kept: Kept, attended: Attended) -> ir.Value:
    """[B, H, Lq, Dv]: kept queries get their row, all others zero."""
    op = call.op
    selected, row = row_of(call, kept, attended, call.query_rank)
    if call.real_query is not None:
        selected = op.And(selected, call.real_query)
    return op.Where(selected, call.rows(attended.out, call.heads, row), op.CastLike(0.0, attended.out))
