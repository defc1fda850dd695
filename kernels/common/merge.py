"""Joins partial attentions: (out, lse) pairs over disjoint keys -> the (out, lse) of all their keys.

`out` is a softmax-weighted mean and `lse` the log of the sum that it was divided by, so with `lse = logaddexp(lse_1, lse_2)` the
whole is `exp(lse_1 - lse) * out_1 + exp(lse_2 - lse) * out_2`. (FlashAttention, arXiv 2205.14135, section 3.1.) It is associative
and commutative, but for rounding; a part that read no key in a row (lse -inf) leaves the other as it is, whatever its own `out`
holds there, and two such parts give zero and -inf.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.results import empty_result
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.types import Attended

Tensor = torch.Tensor


def merge_reference(part: Attended, other: Attended) -> Attended:
    """`tsa::merge` for tensors on any device. Half inputs are joined in float32, float64 stays float64.

    Args:
        part, other: out `[B, H, Lq, Dv]`, lse float32 `[B, H, Lq]`, natural; any strides.
    """
    dtype = torch.float64 if part[0].dtype == torch.float64 else torch.float32
    lse = torch.logaddexp(part[1].to(dtype), other[1].to(dtype))
    total = torch.zeros_like(part[0], dtype=dtype)
    for out, own in (part, other):
        share = torch.exp(own.to(dtype) - lse)
        total += torch.where((own == -torch.inf)[..., None], 0.0, share[..., None] * out.to(dtype))
    return Attended(empty_result(part[0], part[0]).copy_(total), lse.float())


def merge(part: Attended, other: Attended) -> Attended:
    """`tsa::merge` by Triton: reads both parts once and writes the whole. Nothing waits for the device."""
    from tsa_compile.kernels.common.merge_device import merge_kernel

    (out, lse), (other_out, other_lse) = part, other
    if out.dtype == torch.float64:
        return merge_reference(part, other)
    batch, heads, rows, dim = out.shape
    merged = empty_result(out, out)
    merged_lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device)
    tiles = cdiv(rows, BLOCK)
    launch(
        merge_kernel, (tiles * heads * batch,), (out, lse, other_out, other_lse, merged, merged_lse),
        (*out.stride(), *lse.stride(), *other_out.stride(), *other_lse.stride(), *merged.stride()[:3], heads, rows, tiles),
        D=dim, BLOCK_D=next_power_of_2(dim), BLOCK=BLOCK,
    )  # fmt: skip
    return Attended(merged, merged_lse)


BLOCK = 32  # rows of a program
