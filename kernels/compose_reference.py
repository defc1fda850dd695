"""Selections in plain PyTorch: scores, then the choice, one batch row after the other without its padding.

The contract is docs/operators.md, `select_tokens` and `select_keys`; this file is its executable form and the product's CPU path.
It synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.score.probes.reference import probe_scores_reference
from tsa_compile.kernels.score.window.reference import token_scores_reference
from tsa_compile.kernels.select.tokens.reference import everything_row, select_row

Tensor = torch.Tensor


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
    """`tsa::select_tokens` for tensors on any device. Source: arXiv 2602.03216, section 3."""
    lists = q.shape[1] if share == "head" else k.shape[1]

    def select(q_row: Tensor, k_row: Tensor) -> tuple[Tensor, Tensor]:
        length = k_row.shape[1]
        if length <= min_tokens + window or coverage == 0 or q_row.shape[1] == 0:
            return everything_row(lists, length, q.device)
        scores = token_scores_reference(q_row, k_row, scale, window, pool)
        return select_row(scores, length, coverage, min_tokens, heavy, lists)

    return _by_row(q, k, key_mask, lists, heavy, True, select)


def select_keys_reference(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, coverage: float, probes: int, min_keys: int
) -> tuple[Tensor, Tensor]:
    """`tsa::select_keys` for tensors on any device."""

    def select(q_row: Tensor, k_row: Tensor) -> tuple[Tensor, Tensor]:
        heads, length = q_row.shape[0], k_row.shape[1]
        if length <= min_keys + 1 or coverage == 0 or q_row.shape[1] == 0:
            return everything_row(heads, length, q.device)
        scores = probe_scores_reference(q_row, k_row, scale, probes)[:, :-1]
        return select_row(scores, length, coverage, min_keys)

    return _by_row(q, k, key_mask, q.shape[1], 0, q.shape[2] == k.shape[2], select)[:2]


def _by_row(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    lists: int,
    heavy: int,
    queries_are_keys: bool,
    select: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """`select(q [H, m, D], k [Hk, L, D])` for each batch row without its padding; positions are mapped back.

    queries_are_keys: the queries are the last of the keys' positions, so those that are padding are removed as well.
    """
    batch, q_len, k_len = q.shape[0], q.shape[2], k.shape[2]
    new = lambda *shape: torch.full(shape, -1, dtype=torch.int32, device=q.device)  # noqa: E731
    indices, counts, heavy_indices = new(batch, lists, k_len), new(batch), new(batch, lists, heavy)
    for b in range(batch):
        q_row, k_row, real = q[b], k[b], torch.arange(k_len, device=q.device)
        if key_mask is not None:
            real = key_mask[b].nonzero().squeeze(1)
            k_row = k_row[:, real]
            if queries_are_keys:
                q_row = q_row[:, real[real >= k_len - q_len] - (k_len - q_len)]
        kept, heaviest = select(q_row, k_row)
        counts[b] = kept.shape[1]
        indices[b, :, : kept.shape[1]] = real[kept].int()
        heavy_indices[b, :, : heaviest.shape[1]] = real[heaviest].int()
    return indices, counts, heavy_indices
