"""A token by its probability, without a look at the device."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def sample(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One entry of the last dimension by its probability: float `[..., V]` -> int64 `[..., 1]`.

    The first of exponential waiting times with these probabilities as rates. `torch.multinomial` waits for the device; this may
    stand in a CUDA graph, whose replays draw anew.

    Args:
        chances: at least 0; they need not have the sum 1.
        generator: on their device; None: torch's own.
    """
    waits = torch.empty_like(chances).exponential_(generator=generator)
    return (chances / waits).argmax(-1, keepdim=True)
