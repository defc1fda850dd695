"""Rows of half-precision numbers to shared memory, as both Hopper kernels gather them, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared  # in 3.9


@gluon.constexpr_function
def row_layout(dim, warps):
    """16 bytes a thread, whole rows of `dim` half-precision numbers."""
    return gl.BlockedLayout([1, 8], [32 * 8 // dim, dim // 8], [warps, 1], [1, 0])


@gluon.jit
def gather_rows(tile, x, positions, stride_l, D: gl.constexpr, WARPS: gl.constexpr):
    """Starts copies of the rows of x at `positions`, none negative, into a shared tile [rows, D]: one copy, since Triton sets a
    barrier between two that write to the same ring."""
    columns = x + gl.arange(0, D, layout=gl.SliceLayout(0, row_layout(D, WARPS)))
    # Both factors below 2**32: one instruction; a product of signed 64-bit numbers takes four.
    starts = positions.to(gl.uint32).to(gl.uint64) * gl.to_tensor(stride_l).to(gl.uint32).to(gl.uint64)
    async_load(tile, gl.expand_dims(columns, 0) + gl.expand_dims(starts, 1))
