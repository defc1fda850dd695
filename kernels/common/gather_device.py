"""Rows of half-precision numbers by their positions, as the Hopper kernels read and write them, in Gluon."""

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
def row_pointers(x, positions, stride_l, D: gl.constexpr, WARPS: gl.constexpr):
    """Addresses [rows, D] of the rows of x at int32 `positions`; of a negative one, an address that must not be used.

    In bytes, and by PTX, so that each row's address is one multiplication and addition; from Triton's own product of
    widened factors ptxas makes four instructions, and a kernel that gathers is slower for them.
    """
    columns = x + gl.arange(0, D, layout=gl.SliceLayout(0, row_layout(D, WARPS)))
    row_bytes = gl.to_tensor(stride_l).to(gl.uint32) * 2
    starts = gl.inline_asm_elementwise(
        "mul.wide.u32 $0, $1, $2;", "=l,r,r", [positions, row_bytes], dtype=gl.int64, is_pure=True, pack=1
    )
    at = gl.expand_dims(columns.to(gl.pointer_type(gl.uint8), bitcast=True), 0) + gl.expand_dims(starts, 1)
    at = at.to(gl.pointer_type(x.dtype.element_ty), bitcast=True)
    return gl.max_contiguous(gl.multiple_of(at, [16, 16]), [1, 8])  # what the cast hides


@gluon.jit
def gather_rows(tile, x, positions, stride_l, D: gl.constexpr, WARPS: gl.constexpr):
    """Starts copies of the rows of x at `positions`, none negative, into a shared tile [rows, D]: one copy, since Triton sets a
    barrier between two that write to the same ring."""
    async_load(tile, row_pointers(x, positions, stride_l, D, WARPS))
