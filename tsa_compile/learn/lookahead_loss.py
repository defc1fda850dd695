"""What a lookahead index is trained on: needed pages against a few of the others, by a focal loss in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def drawn(needed: Tensor, candidates: Tensor, negatives: int, generator: torch.Generator) -> Tensor:
    """bool, like `needed`: all needed pages, and for each of them `negatives` other candidates of the text, drawn at random."""
    others = (candidates & ~needed).flatten().nonzero()[:, 0]
    wanted = negatives * max(1, int((needed & candidates).sum()))
    chosen = others[torch.randperm(len(others), generator=generator)[:wanted].to(others.device)]
    taken = (needed & candidates).flatten()
    taken[chosen] = True
    return taken.view(needed.shape)


def focal_loss(logits: Tensor, needed: Tensor, taken: Tensor, gamma: float) -> Tensor:
    """The mean over `taken` of `(1 - p)^gamma * -log p`, where `p` is what the index says of what is true (arXiv 1708.02002).

    Args:
        logits: float32 `[n, P]`. needed, taken: bool `[n, P]`.
    """
    entropy = F.binary_cross_entropy_with_logits(logits[taken], needed[taken].float(), reduction="none")
    return ((1 - torch.exp(-entropy)) ** gamma * entropy).mean()
