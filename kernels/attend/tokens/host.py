"""Token-sparse attention on the GPU: choice of the engine, launch. docs/operators.md is the contract.

Triton is imported only when a Triton engine runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsa_compile.kernels.attend.tokens.reference import sparse_attention_reference
from tsa_compile.kernels.common.launch import check_triton
from tsa_compile.kernels.common.padding import attend_padding
from tsa_compile.kernels.common.results import no_lse
from tsa_compile.kernels.types import Attended, Operands, Strip, Tokens

Tensor = torch.Tensor


def sparse_attention(
    x: Operands, kept: Tokens, scale: float, strip: Strip, dense_below: int, engine: str = "auto", need_lse: bool = False
) -> Attended:
    """Causal attention among the kept tokens of each head; see docs/operators.md, `sparse_attention`.

    Args:
        x: q, k, v in fp16, bf16 or fp32, any strides, and where padding is.
        kept: from `select_tokens`.
        scale: positive factor of the scores.
        strip: completion; if it reads nothing, real rows that are not kept are zero.
        dense_below: rows of Lk tokens or fewer are known to keep every token.
        engine: "auto", "fused", "packed" or "reference".
        need_lse: whether the log-sum-exp is returned; it costs nothing where it is not.

    Raises:
        ValueError: a shape, dtype or scale that the engine does not take.
        RuntimeError: the engine needs a device or a package that is not there.

    Source: Token Sparse Attention, arXiv 2602.03216, section 3. Nothing here waits for the device, except "reference".
    """
    q, k, v = x.q, x.k, x.v
    if engine == "reference" or (engine == "auto" and q.device.type == "cpu"):
        return sparse_attention_reference(x, kept, scale, strip, dense_below, "reference", need_lse)
    check_triton(q, v, scale, engine)
    everything, padded = k.shape[2] <= dense_below, x.view.ranks is not None
    if everything and not padded and not need_lse and q.shape[2] == k.shape[2] and q.device.type == "cuda":
        return Attended(_dense(q, k, v, scale), no_lse(q))
    if everything:  # the strip adds nothing to a row that reads every token
        strip, kept = Strip(), kept._replace(heavy_indices=kept.heavy_indices[..., :0])
    if engine == "auto":
        from tsa_compile.kernels.attend.tokens.engines import choose

        engine = choose(q, k, v)
    if engine == "packed":
        from tsa_compile.kernels.attend.tokens.packed import packed_attention

        result = packed_attention(x, kept, scale, strip, need_lse)
    else:
        from tsa_compile.kernels.attend.tokens.fused import fused_attention

        result = fused_attention(x, kept, scale, strip, need_lse)
    attend_padding(x, result, scale)
    return result


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous().transpose(1, 2)
