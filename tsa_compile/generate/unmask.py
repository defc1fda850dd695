"""How a block of diffusion is unmasked: a step takes the most confident predictions, by number or above a threshold."""

from __future__ import annotations

import dataclasses

import torch

from tsa_compile.generate.sampling import sample

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the blocks of a model are filled; fields as the arguments of `diffusion.diffuse`.

    Raises:
        ValueError: a field is outside its range.
    """

    mask_id: int
    block: int = 32
    steps: int | None = None
    threshold: float | None = None
    part: int | None = None
    shifted: bool = False
    stop_id: int | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        if self.shifted and self.block == 1:
            raise ValueError("block must be at least 2 where predictions are shifted: its first token is not denoised")
        if self.part is not None and (self.part < 1 or self.block % self.part):
            raise ValueError(f"part must divide the {self.block} tokens of a block, got {self.part}")
        if self.steps is not None and not 1 <= self.steps <= self.block:
            raise ValueError(f"steps must be from 1 to the {self.block} tokens of a block, got {self.steps}")
        if self.steps is not None and self.steps % self.parts:
            raise ValueError(f"steps must be a multiple of the {self.parts} parts of a block, got {self.steps}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    @property
    def width(self) -> int:
        """Tokens of a part."""
        return self.part or self.block

    @property
    def parts(self) -> int:
        return self.block // self.width

    def count(self, step: int) -> int:
        """Tokens that step `step` of a part takes at least, from 0 on: even shares, the first steps one more."""
        if self.steps is None:
            return 1
        share, more = divmod(self.width, self.steps // self.parts)
        return share + (step < more)


def possible(logits: Tensor, mask_id: int) -> Tensor:
    """Logits `[..., vocabulary]` in float32, without the token that is never predicted."""
    return logits.float().index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)


def take(part: Tensor, masked: Tensor, logits: Tensor, sampling: Sampling, count: int) -> Tensor:
    """Put the most confident predictions into `part` `[B, n]` where it is `masked`, both in place.

    Args:
        logits: `[B, n, vocabulary]`.
        sampling: its `threshold` adds all predictions of at least that probability.
        count: how many a row at least, where so many are masked.

    Returns:
        bool `[B, n]`: which were put in place.
    """
    logits = possible(logits, sampling.mask_id)
    if sampling.temperature > 0:
        chances = (logits / sampling.temperature).softmax(-1)
        tokens = sample(chances)[..., 0]
    else:
        chances = logits.softmax(-1)
        tokens = logits.argmax(-1)
    confidence = chances.gather(-1, tokens[..., None])[..., 0].masked_fill(~masked, -1.0)
    taken = torch.zeros_like(masked).scatter(1, confidence.topk(count, 1).indices, True)
    if sampling.threshold is not None:
        taken |= confidence >= sampling.threshold
    taken &= masked
    part.copy_(torch.where(taken, tokens, part))
    masked &= ~taken
    return taken
