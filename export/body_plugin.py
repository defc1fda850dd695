"""The attention of a site by TensorRT plugins (`tensorrt_plugin`), after a selection by standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsa_compile.export.body_call import Call
from tsa_compile.export.body_select import Kept
from tsa_compile.export.errors import ExportError
from tsa_compile.export.ops import INT64

if TYPE_CHECKING:
    import onnx_ir as ir

INT32 = 6  # onnx.TensorProto.INT32


def attend_by_plugins(call: Call, kept: Kept) -> ir.Value:
    """[B, H, Lq, Dv]. The plugins take what docs/operators.md calls indices, counts and heavy_indices, and `Kept.slots`.

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
