"""The weights from which an index is trained, or with which it is used without training: from second moments of q and k."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
INITS = ("balanced", "svd")


def start_weights(queries: Tensor, keys: Tensor, width: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """What projects queries and keys, float32 `[width, D]` each, so that products of projections are near `scale * q . k`.

    Args:
        queries, keys: the second moments `[D, D]` of a head before rotation, uncentred: sums of `x x'`, or means.
        width: numbers of a projection.
        scale: of the attention's scores.
        init: "balanced": the least expected squared error of a score for independent queries and keys (reduced-rank regression);
            "svd": both project onto the first principal directions of the queries, as RTPurbo's reproductions do.
    """
    cq, ck = (_regular(x.double()) for x in (queries, keys))
    if init == "svd":
        main = torch.linalg.eigh(cq).eigenvectors[:, -width:].flip(1).mT
        return (scale * main).float(), main.float()
    half_q, back_q = _roots(cq)
    half_k, back_k = _roots(ck)
    u, s, v = torch.linalg.svd(half_q @ half_k)
    root = s[:width].sqrt()[:, None]
    return (scale * root * (u[:, :width].mT @ back_q)).float(), (root * (v[:width] @ back_k)).float()


def _regular(x: Tensor) -> Tensor:
    return x + 1e-4 * x.diagonal().mean() * torch.eye(len(x), dtype=x.dtype, device=x.device)


def _roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(x)
    root = values.clamp_min(1e-30).sqrt()
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT
