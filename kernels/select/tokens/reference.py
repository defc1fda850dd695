"""Token selection in plain PyTorch: how many tokens a row keeps, and which (arXiv 2602.03216, section 3).

The contract is docs/operators.md, `select_tokens`; this file is its executable form and the product's CPU path.
"""

from __future__ import annotations

import math

import torch

from tsa_compile.kernels.score.window.reference import token_scores_reference

Tensor = torch.Tensor
MASS_UNIT = 2.0**52  # one unit of the fixed-point mass is 2**-52


def select_tokens_reference(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    scale: float,
    coverage: float,
    window: int,
    pool: int,
    min_tokens: int,
    heavy: int,
    share: str = "head",
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::select_tokens` for tensors on any device; it works row by row and synchronises with the device.

    Shapes, dtypes and meaning: docs/operators.md. Source: arXiv 2602.03216, section 3.
    """
    (batch, heads, q_len, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    lists = heads if share == "head" else kv_heads
    indices = torch.full((batch, lists, k_len), -1, dtype=torch.int32, device=q.device)
    counts = torch.zeros(batch, dtype=torch.int32, device=q.device)
    heavy_indices = torch.full((batch, lists, heavy), -1, dtype=torch.int32, device=q.device)
    for b in range(batch):
        real = torch.arange(k_len, device=q.device) if key_mask is None else key_mask[b].nonzero().squeeze(1)
        rows = real[real >= k_len - q_len] - (k_len - q_len)
        q_b, k_b = (q[b], k[b]) if key_mask is None else (q[b][:, rows], k[b][:, real])
        kept, heaviest = _select_row(q_b, k_b, scale, coverage, window, pool, min_tokens, heavy, lists)
        counts[b] = kept.shape[1]
        indices[b, :, : kept.shape[1]] = real[kept].int()
        heavy_indices[b, :, : heaviest.shape[1]] = real[heaviest].int()
    return indices, counts, heavy_indices


def _select_row(
    q: Tensor, k: Tensor, scale: float, coverage: float, window: int, pool: int, min_tokens: int, heavy: int, lists: int
) -> tuple[Tensor, Tensor]:
    """One row without padding -> kept tokens [G, n] and heaviest tokens [G, m] of `lists` lists, ascending."""
    length = k.shape[1]
    everything = torch.arange(length, device=q.device).expand(lists, -1), k.new_zeros(lists, 0, dtype=torch.int64)
    if length <= min_tokens + window or coverage == 0 or q.shape[1] == 0:
        return everything
    scores = token_scores_reference(q, k, scale, window, pool)
    n_drop = count_dropped(scores, coverage)
    scores = scores.unflatten(0, (lists, -1)).sum(1)
    heaviest = largest(scores, min(heavy, scores.shape[1]))
    if n_drop == 0:
        return everything[0], heaviest[:, :0]
    n_keep = max(min_tokens, scores.shape[1] - (n_drop + 1))
    tail = torch.arange(length - window, length, device=q.device).expand(lists, -1)
    return torch.cat([largest(scores, n_keep), tail], 1), heaviest


def count_dropped(scores: Tensor, coverage: float) -> int:
    """How many of the lightest tokens together stay below `coverage` of the mass that all heads give.

    Fixed point makes the sums exact, so every implementation counts the same whatever its order of additions.

    Args:
        scores: `[H, N]`, float32 or float64, in [0, 1]; a row sums to at most 1.
        coverage: share of the mass, in (0, 1).
    """
    mass = (scores.double() * MASS_UNIT).long().sum(0)
    threshold = math.ceil(float(mass.sum()) * coverage)
    return int((mass.sort().values.cumsum(0) < threshold).sum())


def largest(scores: Tensor, n: int) -> Tensor:
    """Positions of the `n` largest of each row of `[H, N]`, ascending; among equals the lowest positions win."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :n].sort(dim=1).values
