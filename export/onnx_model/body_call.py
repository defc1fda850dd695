"""Operands, sizes and row layout that all parts of the function body of `ai.tsa::TokenSparseAttention` share.

A *rank* counts the real tokens of a batch row, a *position* counts all. Without a key mask they are the same. Selection
and masks work in ranks; only reads of q, k and v need positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsa_compile.export.onnx_model.emitter import BOOL, FLOAT, INT64, Ops

if TYPE_CHECKING:
    import onnx_ir as ir

HIDDEN = -1e30  # a score that takes no part; finite, so that a row without keys gives no NaN


class Call:
    """One call of the operator. Sizes are int64 tensors of shape [1]; `[B]` below means B or 1 (the same for all rows).

    Attributes:
        length: [B, 1] real tokens of the row.
        first_query: [B, 1] rank of the row's first query.
        query_rank: [B, Lq] rank of each query position; any value at padding.
        real_query: [B, 1, Lq, 1] bool, or None if all are real.
    """

    def __init__(self, op: Ops, q: ir.Value, k: ir.Value, v: ir.Value, key_mask: ir.Value | None, checked: bool = False) -> None:
        self.op, self.q, self.k, self.v, self.key_mask = op, q, k, v, key_mask
        self.batch, self.heads, self.q_len, self.dim = (op.Shape(q, start=i, end=i + 1) for i in range(4))
        self.kv_heads, self.k_len = op.Shape(k, start=1, end=2), op.Shape(k, start=2, end=3)
        self.v_dim = op.Shape(v, start=3, end=4)
        self.group = op.Div(self.heads, self.kv_heads)
        self.offset = op.Sub(self.k_len, self.q_len)  # position of the first query
        if checked:
            self._refuse_misfits()
        self.scale = op.attribute("scale", "float")
        self.column = self.range(self.k_len)  # [Lk]
        if key_mask is None:
            self._without_padding()
        else:
            self._with_padding(key_mask)

    def _refuse_misfits(self) -> None:
        """Operands that do not fit stop the runtime, by shapes that it must refuse; a gather out of bounds would not on CUDA."""
        op, rows = self.op, (self.batch, self.kv_heads)
        grouped = op.Reshape(self.q, self.shape(*rows, self.group, self.q_len, self.dim), allowzero=1)
        self.q = op.Reshape(grouped, self.shape(self.batch, self.heads, self.q_len, self.dim), allowzero=1)
        self.k = op.Reshape(self.k, self.shape(*rows, self.k_len, self.dim), allowzero=1)
        self.v = op.Reshape(self.v, self.shape(*rows, self.k_len, self.v_dim), allowzero=1)
        self.offset = op.Shape(op.ConstantOfShape(self.offset))  # more queries than keys: a negative size

    def _without_padding(self) -> None:
        op = self.op
        self._position_of_rank: ir.Value | None = None
        self.length = op.Unsqueeze(self.k_len, [0])
        self.first_query = op.Unsqueeze(self.offset, [0])
        self.query_rank = op.Unsqueeze(op.Add(self.range(self.q_len), self.offset), [0])
        self.real_query: ir.Value | None = None

    def _with_padding(self, key_mask: ir.Value) -> None:
        op = self.op
        real = op.Cast(key_mask, to=INT64)
        rank = op.Sub(op.CumSum(real, 1), 1)
        self.length = op.ReduceSum(real, [1], keepdims=1)
        self.first_query = op.Sub(self.length, op.ReduceSum(self._queries(real), [1], keepdims=1))
        self.query_rank = self._queries(rank)
        self.real_query = op.Cast(op.Unsqueeze(self._queries(real), [1, 3]), to=BOOL)
        self._position_of_rank = self.compact(op.Where(key_mask, rank, -1), self.k_len, axis=1)

    def _queries(self, x: ir.Value) -> ir.Value:
        """[B, Lk] -> [B, Lq], the last ones."""
        return self.op.Slice(x, self.offset, self.k_len, [1])

    def range(self, count: ir.Value) -> ir.Value:
        """0, 1, ... count - 1."""
        return self.op.Range(0, self.op.Squeeze(count, [0]), 1)

    def shape(self, *sizes: ir.Value | int) -> ir.Value:
        """A shape tensor from sizes of shape [1] and Python ints."""
        op = self.op
        return op.Concat(*(op.constant([s]) if isinstance(s, int) else s for s in sizes), axis=0)

    def compact(self, slots: ir.Value, capacity: ir.Value, axis: int) -> ir.Value:
        """The indices along the last axis, in order of their slot: result[..., slots[..., i]] = i; -1: no slot.

        slots: [B, Lk] or [B, H, Lk]; the result has `capacity` entries there, 0 where no index has that slot.
        """
        op = self.op
        leading = op.Shape(slots, start=0, end=axis)
        spare = op.Add(capacity, 1)  # indices without a slot are written behind the end
        empty = op.Expand(0, op.Concat(leading, spare, axis=0))
        target = op.Where(op.Less(slots, 0), capacity, slots)
        filled = op.ScatterElements(empty, target, op.Expand(self.column, op.Shape(slots)), axis=axis)
        return op.Slice(filled, [0], capacity, [axis])

    def position(self, rank: ir.Value) -> ir.Value:
        """Positions of the tokens with these ranks. rank: [B, n] or [B, H, n], in [0, Lk)."""
        op = self.op
        if self._position_of_rank is None:
            return rank
        table, at = self._position_of_rank, op.Reshape(rank, self.shape(self.batch, -1))
        return op.Reshape(op.GatherElements(table, at, axis=1), op.Shape(rank))

    def per_head(self, x: ir.Value) -> ir.Value:
        """[B, n] -> [B, H, n], with B and H spelled out."""
        op = self.op
        n = op.Shape(x, start=1, end=2)
        return op.Expand(op.Unsqueeze(x, [1]), self.shape(self.batch, self.heads, n))

    def by_rank(self, x: ir.Value) -> ir.Value:
        """[B, H, Lk] by position -> by rank."""
        op = self.op
        if self._position_of_rank is None:
            return x
        return op.GatherElements(x, self.per_head(self._position_of_rank), axis=2)

    def rows(self, x: ir.Value, heads: ir.Value, index: ir.Value) -> ir.Value:
        """Rows of x [B, Hx, n, E] for `heads` heads (multiple of Hx). index: [B, heads or 1, m] -> [B, heads, m, E]."""
        op = self.op
        x_heads, n, e = (op.Shape(x, start=i, end=i + 1) for i in (1, 2, 3))
        head = op.Div(op.Mul(self.range(heads), x_heads), heads)
        row = op.Mul(op.Unsqueeze(self.range(self.batch), [1]), x_heads)
        base = op.Unsqueeze(op.Mul(op.Add(row, head), n), [2])
        flat = op.Add(base, index)
        taken = op.Gather(op.Reshape(x, self.shape(-1, e)), op.Reshape(flat, [-1]), axis=0)
        return op.Reshape(taken, self.shape(self.batch, heads, op.Shape(index, start=2, end=3), e), allowzero=1)

    def query_rows(self, rank: ir.Value) -> ir.Value:
        """Queries at these ranks, any row where there is none. rank: [B, H or 1, m] -> [B, H, m, D]."""
        op = self.op
        at = op.Sub(self.position(self.clip(rank, self.k_len)), self.offset)
        return self.rows(self.q, self.heads, self.clip(at, self.q_len))

    def clip(self, index: ir.Value, count: ir.Value) -> ir.Value:
        """The nearest value in [0, count)."""
        op = self.op
        return op.Min(op.Max(index, 0), op.Sub(count, 1))

    def scores(self, q: ir.Value, k: ir.Value, perm: list[int]) -> ir.Value:
        """scale * q k^T in float32; `perm` swaps the last two axes of k."""
        op = self.op
        return op.Mul(op.Cast(op.MatMul(q, op.Transpose(k, perm=perm)), to=FLOAT), self.scale)
