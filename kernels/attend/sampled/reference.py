"""Every key and some values, in plain PyTorch. The contract is docs/operators.md, `sampled_value_attention`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.sampled import draw
from tsa_compile.kernels.common.view import key_range, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def sampled_value_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    seed: Tensor,
    samples: int,
    form: str,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`tsa::sampled_value_attention` on any device. Masses come from float32 logits; sums are those of the inputs' dtype."""
    view = KvView(blocks, block, start, lengths)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    wide = (x.to(dtype) for x in (q, k, v))  # of half inputs the scores would be half, too
    bias = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    every = (blocks, block, start, lengths, key_mask, scale, bias, sinks, softcap)
    exact, lse, scores = torch.ops.tsa.decode_attention(*wide, *every, scores=True)
    first, end = key_range(k, view)
    logits = scores[:, :, 0]  # [B, H, capacity]
    weights = value_weights(logits, first, end, seed, samples, form)
    weights = weights * torch.exp(torch.logsumexp(logits, -1) - lse[:, :, 0]).nan_to_num(0.0)[..., None]  # without the sinks
    values = rows_in_order(v, view)
    drawn = (weights > 0).unflatten(1, (k.shape[1], -1)).any(2)  # [B, Hk, capacity]; no other row of V is read
    values = values.to(dtype).masked_fill(~drawn[..., None], 0)
    sums = weights.to(dtype).unflatten(1, (k.shape[1], -1)) @ values
    few = (end - first <= samples)[:, None, None, None]
    return torch.where(few, exact.to(q.dtype), sums.flatten(1, 2)[:, :, None].to(q.dtype)), lse


def value_weights(logits: Tensor, first: Tensor, end: Tensor, seed: Tensor, samples: int, form: str) -> Tensor:
    """By what each value is multiplied: float64 `[B, H, capacity]`, of logits of that shape, natural, -inf where hidden.

    Args:
        first, end: int `[B]`, the range of each row's keys.
        seed, samples, form: as the operator has them.
    """
    heads, capacity = logits.shape[1:]
    masses = draw.key_masses(logits.double() * draw.LOG2_E)
    tiles = torch.arange(masses.totals.shape[-1], device=logits.device)
    in_tiles = draw.offset_of(draw.random_words(seed, end - 1, heads, tiles), masses.totals)
    if form == "prop":
        word = draw.random_words(seed, end - 1, heads, tiles.new_full((1,), draw.OF_TILES))[..., 0]
        weights = draw.proportional(masses, samples, draw.offset_of(word, draw.tile_masses(masses).sum(-1)), in_tiles)
    else:
        there = (-(-end // draw.TILE) - first // draw.TILE).clamp(min=1)
        weights = draw.equal_tiles(masses, (samples // there).clamp(min=1)[:, None].expand(-1, heads), in_tiles)
    return weights.flatten(-2)[..., :capacity]
