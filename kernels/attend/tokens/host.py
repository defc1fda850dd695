"""Token-sparse attention on the GPU: checks, choice of the engine, launch. docs/operators.md is the contract.

Triton is imported only here-after and only when a Triton engine runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsa_compile.kernels.attend.tokens.reference import sparse_attention_reference
from tsa_compile.kernels.common.tiles import capability_of

Tensor = torch.Tensor
MAX_HEAD_DIM = 256
ENGINES = ("auto", "fused", "packed", "reference")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    heavy_indices: Tensor,
    key_mask: Tensor | None,
    scale: float,
    strip_window: int,
    strip_sinks: int,
    dense_below: int,
    engine: str = "auto",
) -> Tensor:
    """Causal attention among the kept tokens of each head; see docs/operators.md, `sparse_attention`.

    Args:
        q, k, v: [B, H, Lq, D], [B, Hk, Lk, D], [B, Hk, Lk, Dv]; fp16, bf16 or fp32, any strides.
        indices, counts, heavy_indices: int32 [B, G, Lk], [B], [B, G, heavy] from `select_tokens`; G is H or Hk.
        key_mask: bool [B, Lk], true for real tokens, or None.
        scale: positive factor of the scores.
        strip_window, strip_sinks: completion strip; with heavy: width 0 and both 0, rows that are not kept are zero.
        dense_below: rows of Lk tokens or fewer are known to keep every token.
        engine: "auto", "fused", "packed" or "reference".

    Returns:
        [B, H, Lq, Dv], stored as [B, Lq, H, Dv].

    Raises:
        ValueError: unknown engine, or a shape, dtype or scale that the engine does not take.
        RuntimeError: the engine needs a device or a package that is not there.

    Source: Token Sparse Attention, arXiv 2602.03216, section 3. Nothing here waits for the device, except "reference".
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
    selection = (indices, counts, heavy_indices, key_mask)
    if engine == "reference" or (engine == "auto" and q.device.type == "cpu"):
        return sparse_attention_reference(q, k, v, *selection, scale, strip_window, strip_sinks, dense_below, "reference")
    check_triton(q, v, scale, engine)
    everything = k.shape[2] <= dense_below
    if everything and key_mask is None and q.shape[2] == k.shape[2] and q.device.type == "cuda":
        return _dense(q, k, v, scale)
    if everything:  # the strip adds nothing to a row that reads every token
        strip_window, strip_sinks, heavy_indices = 0, 0, heavy_indices[..., :0]
    if engine == "auto":
        from tsa_compile.kernels.attend.tokens.engines import choose

        engine = choose(q, k, v)
    if engine == "packed":
        from tsa_compile.kernels.attend.tokens.packed import packed_attention as attention
    else:
        from tsa_compile.kernels.attend.tokens.fused import fused_attention as attention  # type: ignore[assignment]
    return attention(q, k, v, indices, counts, heavy_indices, key_mask, scale, strip_window, strip_sinks)


def check_triton(q: Tensor, v: Tensor, scale: float, engine: str) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"engine {engine!r} takes float16, bfloat16 and float32, not {q.dtype}")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        raise ValueError(f"engine {engine!r} takes head dims up to {MAX_HEAD_DIM}, not {q.shape[-1]} and {v.shape[-1]}")
    if scale <= 0:
        raise ValueError(f"engine {engine!r} takes a positive scale, not {scale}")
    if q.device.type != "cuda" and not _interpreted():
        raise RuntimeError(f"engine {engine!r} needs CUDA tensors; on {q.device.type} use 'auto' or 'reference'")


def _interpreted() -> bool:
    """Whether Triton runs kernels through its interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous().transpose(1, 2)


__all__ = ["capability_of", "sparse_attention"]
