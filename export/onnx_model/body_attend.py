"""Attention among the kept tokens, by standard operators and a scatter to all rows, or by TensorRT plugins.

docs/operators.md, `sparse_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tsa_compile.export.common import ExportError
from tsa_compile.export.onnx_model.body_call import HIDDEN, Call
from tsa_compile.export.onnx_model.body_select import Kept
from tsa_compile.export.onnx_model.emitter import INT64

if TYPE_CHECKING:
    import onnx_ir as ir

INT32 = 6  # onnx.TensorProto.INT32


class Attended(NamedTuple):
    """Attention of the kept queries: row t of head h is its (first + t)-th kept token.

    first: [B, H, 1] kept tokens before the first query.
    size: [1] rows.
    out: [B, H, size, Dv] of the dtype of v, normalised.
    scores: [B, H, size, kept] float32, HIDDEN where a key comes after the query.
    """

    first: ir.Value
    size: ir.Value
    out: ir.Value
    scores: ir.Value


def attend_kept(call: Call, kept: Kept) -> Attended:
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
    return Attended(first, size, out, scores)


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


def attend_by_plugins(call: Call, kept: Kept) -> ir.Value:
    """[B, H, Lq, Dv] by `tensorrt_engine.plugin`, after a selection by standard operators.

    The plugins take what docs/operators.md calls indices, counts and heavy_indices, and `Kept.slots`.

    Raises:
        ExportError: the site has a key mask.
    """
    op = call.op
    if call.key_mask is not None:
        raise ExportError("the TensorRT plugins take sites without a key mask; export those with target='tensorrt'")
    counts = op.ReduceSum(op.Cast(op.GreaterOrEqual(kept.slots, 0), to=INT64), [2], keepdims=0)  # [B, H], one number a row
    counts = op.ReduceMax(counts, [1], keepdims=0)
    tokens = call.compact(kept.slots, call.k_len, axis=2)
    indices = op.Where(op.Less(call.column, op.Unsqueeze(counts, [1, 2])), tokens, -1)
    selection = [op.Cast(x, to=INT32) for x in (indices, counts)]
    operands = [call.q, call.k, call.v]
    if kept.heavy is None:
        return op.plugin(1, "sparse_prefill", [*operands, *selection], scale="scale")[0]
    part, lse = op.plugin(2, "sparse_prefill_lse", [*operands, *selection], scale="scale")
    everything = op.Equal(op.Unsqueeze(counts, [1, 2]), call.k_len)  # then the strip adds nothing
    place = call.range(op.Shape(kept.heavy, start=2, end=3))
    unused = op.Or(everything, op.GreaterOrEqual(place, op.Unsqueeze(kept.heavy_count, [2])))
    heavy = op.Where(unused, -1, kept.heavy)
    strip = [*operands, part, lse, op.Cast(kept.slots, to=INT32), op.Cast(heavy, to=INT32)]
    return op.plugin(1, "sparse_strip", strip, scale="scale", window="strip_window", sinks="strip_sinks")[0]
