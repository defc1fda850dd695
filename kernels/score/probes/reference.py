"""Probe scores in plain PyTorch: a few queries, spread evenly, say which keys matter to all.

Ours, not from a paper; MInference (arXiv 2407.02490) scores all keys by the last queries of a prefill. The contract is
docs/operators.md, `select_keys`, step 2.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def probe_scores_reference(q: Tensor, k: Tensor, scale: float, probes: int) -> Tensor:
    """Mean attention of `probes` queries, evenly spread, to each key of one row without padding.

    Args:
        q, k: `[H, n, D]`, `[Hk, L, D]`.
        scale: factor of the scores.
        probes: how many queries score; with fewer queries than that some count more than once.

    Returns:
        `[H, L]`, float32 (float64 for float64 inputs), each >= 0; a row sums to 1.
    """
    (heads, n, _), (kv_heads, length, _) = q.shape, k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q[:, probe_ranks(n, probes, q.device)].to(dtype)
    scores = (q.reshape(kv_heads, -1, q.shape[2]) @ k.to(dtype).mT).reshape(heads, probes, length) * scale
    return scores.softmax(-1).mean(1)


def probe_ranks(n: int | Tensor, probes: int, device: torch.device) -> Tensor:
    """Where the probes are among `n` queries: the middles of `probes` equal parts."""
    return (2 * torch.arange(probes, device=device) + 1) * n // (2 * probes)
