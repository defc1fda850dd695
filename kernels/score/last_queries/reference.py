"""Scores by the last queries in plain PyTorch: how much they look at each earlier token (arXiv 2602.03216, section 3).

The contract is docs/operators.md, `select_tokens`, steps 2 and 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def token_scores_reference(q: Tensor, k: Tensor, scale: float, last_queries: int, pool: int) -> Tensor:
    """Pooled mean attention of the last queries to each token before them, for one row without padding.

    Args:
        q: `[H, Lq, D]`, the last `Lq` of the `L` positions.
        k: `[Hk, L, D]`, `L > last_queries`.
        scale: factor of the scores.
        last_queries: how many queries score (fewer if `Lq < last_queries`).
        pool: odd width of the average; positions outside count as zeros.

    Returns:
        `[H, L - last_queries]`, float32 (float64 for float64 inputs), each >= 0; a row sums to at most 1.
    """
    heads, (kv_heads, length, _) = q.shape[0], k.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q[:, -last_queries:].to(dtype)
    rows = q.shape[1]
    scores = (q.reshape(kv_heads, -1, q.shape[2]) @ k.to(dtype).mT).reshape(heads, rows, length) * scale
    later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    scores[:, :, length - rows :].masked_fill_(later, -torch.inf)
    mean = scores.softmax(-1)[:, :, : length - last_queries].mean(1)
    return F.avg_pool1d(mean, pool, stride=1, padding=pool // 2)
