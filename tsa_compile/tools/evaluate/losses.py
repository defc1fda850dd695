"""Perplexity of a text and divergence from dense, from hidden states, a few positions of the vocabulary at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tsa_compile.check import Comparison, compare_logits
from tsa_compile.tools.evaluate.runner import Runner

Tensor = torch.Tensor
_POSITIONS = 1024  # whose logits exist at a time


@torch.no_grad()
def token_losses(runner: Runner, hidden: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood in nats of ids [B, L] from their hidden states [B, L, D]: [B, L - 1], float32."""
    flat, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    parts = [
        F.cross_entropy(runner.logits(h).float(), t, reduction="none")
        for h, t in zip(flat.split(_POSITIONS), targets.split(_POSITIONS), strict=True)
    ]
    return torch.cat(parts).view(ids.shape[0], -1)


def perplexity(losses: list[float]) -> float:
    """exp of the mean of per-sample mean losses."""
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def divergence(runner: Runner, dense: Tensor, sparse: Tensor) -> list[Comparison]:
    """KL(dense || sparse) and agreement for each sample, from hidden states [B, n, D]."""
    return [compare_logits(runner.logits(d), runner.logits(s)) for d, s in zip(dense, sparse, strict=True)]
