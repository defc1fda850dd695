"""Rotary position embedding undone (RoPE, arXiv 2104.09864): queries and keys as they were before it."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def before_rotation(x: Tensor, positions: Tensor, frequencies: Tensor, interleaved: bool, factor: float) -> Tensor:
    """`x` with its rotation undone, in float32 (float64 stays).

    The angle of pair `i` at position `p` is `p * frequencies[i]`, rounded to float32 as models compute it.

    Args:
        x: `[..., L, D]`, rotated.
        positions: int, broadcasts to `[..., L]`.
        frequencies: float32 `[n]`; the first `2 n` dims are rotated, the others are as they were.
        interleaved: pair `i` is dims `2 i` and `2 i + 1`; otherwise `i` and `n + i`.
        factor: by which the rotation also scales (YaRN); not 0.
    """
    n, wide = frequencies.shape[0], torch.promote_types(x.dtype, torch.float32)
    angle = (positions[..., None].float() * frequencies).to(wide)
    cos, sin = angle.cos() / factor, angle.sin() / factor
    turned = x[..., : 2 * n].to(wide)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :n], turned[..., n:])
    pairs = (first * cos + second * sin, second * cos - first * sin)
    back = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([back, x[..., 2 * n :].to(wide)], -1)
