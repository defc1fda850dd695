"""The prefill and strip kernels with the argument order of TensorRT's ahead-of-time plugins: inputs, int32 sizes, outputs.

All tensors are contiguous; a float cannot be passed, so the scale is a constant. Triton.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.tokens.device import sparse_prefill_kernel
from tsa_compile.kernels.attend.tokens.strip_device import strip_kernel


@triton.jit
def wide(x):
    return tl.full([], 0, tl.int64) + x


@triton.jit
def contiguous_prefill(
    q, k, v, indices, counts, heads, kv_heads, q_len, k_len, out, lse,
    SCALE_LOG2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The prefill kernel on contiguous tensors: their strides follow from their sizes."""
    q_sh, k_sh, v_sh, o_sh = wide(q_len) * D, wide(k_len) * D, wide(k_len) * DV, wide(q_len) * DV
    tiles = tl.minimum(tl.cdiv(k_len, BLOCK_M), tl.cdiv(q_len, BLOCK_M) + 1)
    sparse_prefill_kernel(
        q, k, v, out, lse, indices, counts, heads * q_sh, q_sh, D, 1, kv_heads * k_sh, k_sh, D, 1,
        kv_heads * v_sh, v_sh, DV, 1, heads * o_sh, o_sh, DV, wide(k_len) * heads, wide(k_len),
        heads, kv_heads, heads, q_len, k_len, tiles, heads, SCALE_LOG2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, STRIP, PRECISION,
    )  # fmt: skip


@triton.jit
def prefill_plugin_kernel(
    q, k, v, indices, counts, heads, kv_heads, q_len, k_len, out,
    SCALE_LOG2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, H, Lq, Dv]: attention among the kept tokens, zero elsewhere."""
    contiguous_prefill(
        q, k, v, indices, counts, heads, kv_heads, q_len, k_len, out, out,
        SCALE_LOG2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, PRECISION,
    )  # fmt: skip


@triton.jit
def prefill_lse_plugin_kernel(
    q, k, v, indices, counts, heads, kv_heads, q_len, k_len, out, lse,
    SCALE_LOG2: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, and its log-sum-exp [B, H, Lq], for rows that are kept; the others stay unwritten, for the strip to fill."""
    contiguous_prefill(
        q, k, v, indices, counts, heads, kv_heads, q_len, k_len, out, lse,
        SCALE_LOG2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, True, PRECISION,
    )  # fmt: skip


@triton.jit
def strip_plugin_kernel(
    q, k, v, part, part_lse, slots, heavy_indices, heads, kv_heads, q_len, k_len, heavy, out,
    SCALE_LOG2: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, H, Lq, Dv]: every row's strip, merged with `part` where the row is kept."""
    q_sh, k_sh, v_sh, o_sh = wide(q_len) * D, wide(k_len) * D, wide(k_len) * DV, wide(q_len) * DV
    strip_kernel(
        q, k, v, out, part, part_lse, slots, heavy_indices, slots, slots, None,
        heads * q_sh, q_sh, D, 1, kv_heads * k_sh, k_sh, D, 1, kv_heads * v_sh, v_sh, DV, 1, heads * o_sh, o_sh, DV,
        heads * o_sh, o_sh, DV, wide(q_len) * heads, wide(q_len), wide(k_len) * heads, wide(k_len),
        wide(heavy) * heads, wide(heavy), heads, kv_heads, heads, q_len, k_len, heavy, WINDOW, SINKS, SCALE_LOG2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, False, PRECISION,
    )  # fmt: skip
