"""Key selection for bidirectional attention in plain PyTorch: a few queries, spread evenly, say which keys matter.

Ours, not from a paper; MInference (arXiv 2407.02490) scores all keys by the last queries of a prefill. The contract is
docs/operators.md, `select_keys`; this file is its executable form.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.select.tokens.reference import count_dropped, largest

Tensor = torch.Tensor


def select_keys_reference(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, coverage: float, probes: int, min_keys: int
) -> tuple[Tensor, Tensor]:
    """`tsa::select_keys` for tensors on any device; it works row by row and synchronises with the device.

    Shapes, dtypes and meaning: docs/operators.md.
    """
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    indices = torch.full((batch, heads, k_len), -1, dtype=torch.int32, device=q.device)
    counts = torch.zeros(batch, dtype=torch.int32, device=q.device)
    for b in range(batch):
        real = torch.arange(k_len, device=q.device) if key_mask is None else key_mask[b].nonzero().squeeze(1)
        own = key_mask is not None and q_len == k_len
        rows = real if own else torch.arange(q_len, device=q.device)
        kept = _select_row(q[b][:, rows], k[b][:, real], scale, coverage, probes, min_keys)
        counts[b] = kept.shape[1]
        indices[b, :, : kept.shape[1]] = real[kept].int()
    return indices, counts


def _select_row(q: Tensor, k: Tensor, scale: float, coverage: float, probes: int, min_keys: int) -> Tensor:
    """One row without padding -> kept keys [H, n], ascending."""
    heads, length = q.shape[0], k.shape[1]
    everything = torch.arange(length, device=q.device).expand(heads, -1)
    if length <= min_keys + 1 or coverage == 0 or q.shape[1] == 0:
        return everything
    scores = probe_scores_reference(q, k, scale, probes)[:, :-1]
    n_drop = count_dropped(scores, coverage)
    if n_drop == 0:
        return everything
    kept = largest(scores, max(min_keys, length - 1 - (n_drop + 1)))
    return torch.cat([kept, kept.new_full((heads, 1), length - 1)], 1)


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
