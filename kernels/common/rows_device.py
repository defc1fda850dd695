"""Rows of a matrix in memory: loads and stores of those that a list names. Triton."""

import triton
import triton.language as tl


@triton.jit
def load_rows(x, at, stride_l, stride_d, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows `at` of x [L, D] as a tile [len(at), BLOCK_D]; columns beyond D are zero."""
    x += at[:, None] * stride_l + d[None, :] * stride_d
    if D == BLOCK_D:
        return tl.load(x)
    return tl.load(x, mask=(d < D)[None, :], other=0.0)


@triton.jit
def load_columns(x, at, stride_l, stride_d, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows `at` of x [L, D], transposed: a tile [BLOCK_D, len(at)]."""
    x += at[None, :] * stride_l + d[:, None] * stride_d
    if D == BLOCK_D:
        return tl.load(x)
    return tl.load(x, mask=(d < D)[:, None], other=0.0)


@triton.jit
def store_rows(out, stride_l, tile, rows, row_ok, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Stores a tile [len(rows), BLOCK_DV] as the rows `rows` of out [L, DV]."""
    dv = tl.arange(0, BLOCK_DV)
    at = out + rows.to(tl.int64)[:, None] * stride_l + dv[None, :]
    tl.store(at, tile.to(out.dtype.element_ty), mask=row_ok[:, None] & (dv < DV)[None, :])


@triton.jit
def store_lse(lse, row_max, row_sum, rows, row_ok):
    """Stores the natural log-sum-exp of the rows `rows` to lse [L]; row_max is in base 2."""
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + rows, (row_max + tl.log2(row_sum)) * ln2, mask=row_ok)


@triton.jit
def zero_rows(out, stride_l, first, last, columns, column_ok, BLOCK: tl.constexpr):
    """Zeroes the rows first..last-1 of one head, then waits for the whole program."""
    for start in tl.range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        at = out + rows.to(tl.int64)[:, None] * stride_l + columns[None, :]
        tl.store(at, 0.0, mask=(rows < last)[:, None] & column_ok[None, :])
    tl.debug_barrier()  # the kept rows among them are stored later, by other threads


@triton.jit
def copy_rows(x, to, at, stride_l, stride_d, slots, ok, write, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """to[slots] = x[at] where ok, zero otherwise, for the slots that `write` names; `to` is [capacity, D]."""
    d = tl.arange(0, BLOCK_D)
    column_ok = (d < D)[None, :]
    x += at[:, None] * stride_l + d[None, :] * stride_d
    rows = tl.load(x, mask=ok[:, None] & column_ok, other=0.0)
    tl.store(to + slots.to(tl.int64)[:, None] * D + d[None, :], rows, mask=write[:, None] & column_ok)
