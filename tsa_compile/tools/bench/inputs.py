"""Inputs that look like attention's: RoPE'd keys, sinks, local decay, heavy tokens. On noise, selection means nothing."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def rope(x: Tensor, base: float = 500_000.0) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of `[B, L, H, D]`, in halves, as Llama's; positions count from 0."""
    length, dim = x.shape[1], x.shape[3]
    frequency = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos()[None, :, None].to(x.dtype), angle.sin()[None, :, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def structured(
    batch: int, heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Q `[B, H, L, D]`, K and V `[B, Hk, L, D]` as views of `[B, L, H, D]`.

    Every head shares a direction between its queries and keys, which RoPE turns into decay with distance; the first four
    keys are sinks; one key in 64 is heavy for all queries of its head.
    """
    g = torch.Generator(device).manual_seed(seed)
    draw = lambda h: torch.randn(batch, length, h, dim, device=device, generator=g, dtype=torch.float32)  # noqa: E731
    shared = torch.randn(1, 1, kv_heads, dim, device=device, generator=g)
    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    k += 0.7 * shared
    q += 0.7 * shared.repeat_interleave(heads // kv_heads, 2)
    q, k = rope(q.to(dtype)), rope(k.to(dtype))
    mean = q.mean(1, keepdim=True).unflatten(2, (kv_heads, -1)).mean(3)
    pull = 4 * dim**0.5 * mean / mean.pow(2).sum(-1, keepdim=True).sqrt()
    k[:, :4] = pull.to(dtype)
    k[:, ::64] += (0.5 * pull).to(dtype)
    return q.transpose(1, 2), k.transpose(1, 2), v.to(dtype).transpose(1, 2)


def forced(scores: Tensor, keep: float, window: int, heavy: int) -> tuple[Tensor, Tensor, Tensor]:
    """A selection of a given size, as `tsa::select_tokens` returns it: each head's best by `scores`, and the window.

    Args:
        scores: `[B, H, L]`; from `L - window` on not read.
        keep: share of the tokens, in (0, 1].

    Returns:
        indices int32 `[B, H, L]` (-1 beyond the count), counts int32 `[B]`, heavy_indices int32 `[B, H, heavy]`.
    """
    batch, heads, length = scores.shape
    count = max(window, round(keep * length))
    ranked = scores[..., : length - window].argsort(-1, descending=True)
    best = ranked[..., : count - window].sort(-1).values.int()
    tail = torch.arange(length - window, length, device=scores.device, dtype=torch.int32).expand(batch, heads, -1)
    rest = best.new_full((batch, heads, length - count), -1)
    counts = torch.full((batch,), count, dtype=torch.int32, device=scores.device)
    return torch.cat([best, tail, rest], -1), counts, ranked[..., :heavy].sort(-1).values.int()
