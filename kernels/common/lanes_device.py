"""Rows of a warpgroup's product by the lanes that hold them, as both Hopper kernels sum them, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HALF = gl.constexpr(64)  # rows of a warpgroup


@gluon.jit
def by_lane(values):
    """A tile [HALF, N] as [HALF, N / 8, 4, 2]: which of a row's 4 lanes has a column is the third index."""
    return gl.reshape(values, [HALF, values.shape[1] // 8, 4, 2])


@gluon.jit
def sum_in_lane(values):
    """Sums [HALF, 4] of what each of a row's 4 lanes has of it: no lane waits for another."""
    return gl.sum(gl.sum(values, 3), 1)
