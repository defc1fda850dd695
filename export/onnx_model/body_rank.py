"""How a body finds thresholds: by sorting (`Sort`) or, where TopK is limited, by bisection (`Bisect`).

Both give the same sets: `largest` the n largest of each row, ties by lowest position; `dropped` the number of smallest
values whose running sum stays below the coverage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tsa_compile.export.onnx_model.body_call import Call
from tsa_compile.export.onnx_model.emitter import DOUBLE, INT64, Ops

if TYPE_CHECKING:
    import onnx_ir as ir


class Ranking(Protocol):
    """The two questions that need an order."""

    def largest(self, call: Call, score: ir.Value, count: ir.Value) -> ir.Value:
        """Members of the `count` [B, 1, 1] largest of score [B, H, Lk] (candidates >= 0, others -1) -> bool."""

    def dropped(self, call: Call, units: ir.Value, candidate: ir.Value) -> ir.Value:
        """n_drop [B, 1] before the + 1. units: int64 [B, Lk], 0 where candidate [B, Lk] is false."""


def _members(op: Ops, score: ir.Value, threshold: ir.Value, count: ir.Value) -> ir.Value:
    """All above the threshold (the count-th largest value), and the first of those equal to it, `count` in all."""
    above, equal = op.Greater(score, threshold), op.Equal(score, threshold)
    missing = op.Sub(count, op.ReduceSum(op.Cast(above, to=INT64), [2], keepdims=1))
    order = op.CumSum(op.Cast(equal, to=INT64), 2)
    return op.Or(above, op.And(equal, op.LessOrEqual(order, missing)))


class Sort:
    """For ONNX Runtime: TopK over the whole row, coverage in float64 as in the reference."""

    def largest(self, call: Call, score: ir.Value, count: ir.Value) -> ir.Value:
        op = call.op
        most = op.Max(op.ReduceMax(op.Reshape(count, [-1]), [0], keepdims=1), 1)
        ordered, _ = op.outputs(2, "TopK", score, most, axis=2)
        last = op.Expand(op.Max(op.Sub(count, 1), 0), call.shape(call.batch, call.heads, 1))
        return _members(op, score, op.GatherElements(ordered, last, axis=2), count)

    def dropped(self, call: Call, units: ir.Value, candidate: ir.Value) -> ir.Value:
        op = call.op
        total = op.ReduceSum(units, [1], keepdims=1)
        product = op.Mul(op.Cast(total, to=DOUBLE), op.attribute("coverage", "tensor"))
        target = op.Cast(op.Ceil(product), to=INT64)
        ordered, _ = op.outputs(2, "TopK", units, call.k_len, axis=1, largest=0)
        below = op.Cast(op.Less(op.CumSum(ordered, 1), target), to=INT64)
        others = op.ReduceSum(op.Cast(op.Not(candidate), to=INT64), [1], keepdims=1)  # zeros that came first
        return op.Max(op.Sub(op.ReduceSum(below, [1], keepdims=1), others), 0)


class Bisect:
    """For TensorRT: no sort (its TopK stops at 3,840), no float64; thresholds are built bit by bit from counts.

    `dropped` takes the coverage as `coverage_q56` (coverage * 2**56, rounded), so its target differs from the
    reference's by a few units of 2**-52.
    """

    _UNIT_BITS = 62  # units < 2**52 * heads

    def largest(self, call: Call, score: ir.Value, count: ir.Value) -> ir.Value:
        op = call.op
        scaled = op.Mul(score, 2.0**40)  # exact, and no score is subnormal any more: the least is 2**-109

        def enough(op: Ops, value: ir.Value) -> ir.Value:
            hits = op.Cast(op.GreaterOrEqual(scaled, value), to=INT64)
            return op.GreaterOrEqual(op.ReduceSum(hits, [2], keepdims=1), count)

        start = op.Expand(2.0**-109, call.shape(call.batch, call.heads, 1))
        positive = enough(op, start)
        factors = op.constant([2.0**i for i in (64, 32, 32, 16, 8, 4, 2, 1)])

        def exponent(op: Ops, step: ir.Value, value: ir.Value) -> list[ir.Value]:
            higher = op.Mul(value, op.Gather(factors, step))
            return [op.Where(enough(op, higher), higher, value)]

        def mantissa(op: Ops, step: ir.Value, value: ir.Value, delta: ir.Value) -> list[ir.Value]:
            higher = op.Add(value, delta)
            return [op.Where(enough(op, higher), higher, value), op.Mul(delta, 0.5)]

        power = op.loop(8, [start], exponent)[0]
        value = op.loop(23, [power, op.Mul(power, 0.5)], mantissa)[0]
        return _members(op, scaled, op.Where(positive, value, 0.0), count)

    def dropped(self, call: Call, units: ir.Value, candidate: ir.Value) -> ir.Value:
        op = call.op
        target = self._target(op, op.ReduceSum(units, [1], keepdims=1))

        def mass_below(op: Ops, value: ir.Value) -> ir.Value:
            return op.ReduceSum(op.Where(op.Less(units, value), units, 0), [1], keepdims=1)

        def bit(op: Ops, step: ir.Value, value: ir.Value, delta: ir.Value) -> list[ir.Value]:
            higher = op.Add(value, delta)
            return [op.Where(op.Less(mass_below(op, higher), target), higher, value), op.Div(delta, 2)]

        zero = op.Mul(target, 0)
        highest = op.Add(zero, 2 ** (self._UNIT_BITS - 1))
        value = op.loop(self._UNIT_BITS, [zero, highest], bit)[0]  # the unit at which the sum reaches the target
        smaller = op.Cast(op.And(op.Less(units, value), candidate), to=INT64)
        missing = op.Sub(op.Sub(target, mass_below(op, value)), 1)
        equal = op.Div(op.Max(missing, 0), op.Max(value, 1))
        return op.Add(op.ReduceSum(smaller, [1], keepdims=1), equal)

    @staticmethod
    def _target(op: Ops, total: ir.Value) -> ir.Value:
        """ceil(total * coverage_q56 / 2**56) from 28-bit digits; total < 2**62."""
        base = 2**28
        c = op.attribute("coverage_q56", "int")
        c1, t1 = op.Div(c, base), op.Div(total, base)
        c0, t0 = op.Sub(c, op.Mul(c1, base)), op.Sub(total, op.Mul(t1, base))
        low = op.Mul(t0, c0)
        carry = op.Div(low, base)
        middle = op.Add(op.Add(op.Mul(t1, c0), op.Mul(t0, c1)), carry)
        whole = op.Add(op.Mul(t1, c1), op.Div(middle, base))
        rest = op.Add(op.Sub(middle, op.Mul(op.Div(middle, base), base)), op.Sub(low, op.Mul(carry, base)))
        return op.Add(whole, op.Cast(op.Greater(rest, 0), to=INT64))
