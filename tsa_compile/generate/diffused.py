"""What a block-diffusion loop gives back: the tokens, and what each block took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from tsa_compile.generate.block_cache import Counts

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Block:
    """What one block took.

    Args:
        prefix: tokens before it.
        forwards: denoising calls of the model, the first included.
        counts: attention calls of the further steps.
        steps: int64 `[B, block]`, the step that took each token, from 1 on; 0: it was given.
    """

    prefix: int
    forwards: int
    counts: Counts
    steps: Tensor


@dataclasses.dataclass(frozen=True)
class Diffused:
    """The result of `diffuse`.

    Args:
        ids: prompt and new tokens `[B, L + new_tokens]`.
        blocks: one entry for each.
        forwards: calls of the model by phase: prefill, denoise_first, denoise, commit.
    """

    ids: Tensor
    blocks: tuple[Block, ...]
    forwards: Mapping[str, int]

    @property
    def sparse_share(self) -> float:
        """Share of the attention calls of further steps that left a token of the prefix out."""
        calls = sum(b.counts.calls for b in self.blocks)
        return sum(b.counts.listed - b.counts.whole for b in self.blocks) / max(1, calls)

    @property
    def never_bit(self) -> float:
        """Share of the blocks in which no list left a token out: dense attention under another name."""
        return sum(b.counts.listed == b.counts.whole for b in self.blocks) / max(1, len(self.blocks))

    def __str__(self) -> str:
        calls = ", ".join(f"{n} {phase}" for phase, n in self.forwards.items())
        return (
            f"{len(self.blocks)} blocks, {sum(self.forwards.values())} forwards ({calls}); {self.sparse_share:.0%} of the "
            f"attention calls after first steps were sparse; no list left a token out in {self.never_bit:.0%} of the blocks"
        )
