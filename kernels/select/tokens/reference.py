"""Which tokens a row keeps, from their scores, in plain PyTorch (arXiv 2602.03216, section 3): steps 4 to 7."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.coverage_reference import count_dropped, finite_scores, largest

Tensor = torch.Tensor


def select_row(
    scores: Tensor, length: int, coverage: float, min_tokens: int, heavy: int = 0, lists: int | None = None
) -> tuple[Tensor, Tensor]:
    """One batch row without padding -> kept tokens `[G, n]` and heaviest tokens `[G, m]`, ascending.

    Args:
        scores: `[H, length - last_queries]`, of the tokens before the last queries, whose own are always kept.
        length: tokens of the row.
        coverage: share of the mass that may be dropped, in (0, 1).
        min_tokens: kept tokens beside those of the last queries, at least.
        heavy: heaviest tokens, at most.
        lists: how many lists share the heads, by the sum of their scores; None: each head has its own.
    """
    lists = lists or scores.shape[0]
    scores = finite_scores(scores)
    everything, nothing = everything_row(lists, length, scores.device)
    n_drop = count_dropped(scores, coverage)
    if n_drop == 0:
        return everything, nothing
    if lists < scores.shape[0]:
        scores = scores.unflatten(0, (lists, -1)).sum(1)
    n_keep = max(min_tokens, scores.shape[1] - (n_drop + 1))
    tail = everything[:, scores.shape[1] :]
    return torch.cat([largest(scores, n_keep), tail], 1), largest(scores, min(heavy, scores.shape[1]))


def everything_row(lists: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(all tokens of a row `[lists, length]`, no heaviest tokens `[lists, 0]`)."""
    everything = torch.arange(length, device=device).expand(lists, -1)
    return everything, everything[:, :0]
