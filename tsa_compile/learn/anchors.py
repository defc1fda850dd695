"""Which layers select, and for whom: similarity of captured mass, and the anchors that keep most of it.

Similarity and dynamic programming: Kascade (arXiv 2512.16391). The greedy rule by loss: IndexCache (arXiv 2603.12201).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor


def top_pages(masses: Tensor, forced: Tensor, wanted: Tensor) -> Tensor:
    """The heaviest pages of each row that are not read anyway, `wanted` `[rows]` of them; of equal masses the lowest first.

    masses: `[..., rows, pages]`, as is the result (bool); forced: bool `[rows, pages]`.
    """
    free = masses.masked_fill(forced, -1.0)
    ranks = free.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (ranks < wanted[:, None]) & (free > 0)


def similarity(masses: Tensor, forced: Tensor, wanted: Tensor, quantile: float = 0.0) -> Tensor:
    """What a layer's heads capture by another layer's lists, over what they capture by their own: `[L, L, Hk, Hk]`.

    Entry `[a, b, h, g]`, for `a <= b`: head `h` of layer `b` reads the list of head `g` of layer `a`. 0 for `a > b`.

    Args:
        masses: attention of each page, float `[L, Hk, rows, pages]`, the mean over the query heads of a KV head.
        forced: bool `[rows, pages]`, pages that every list has.
        wanted: int `[rows]`, pages of a list beside these.
        quantile: of the rows that counts; 0: the worst row's, as published.
    """
    lists = top_pages(masses, forced, wanted).to(masses.dtype)
    own = (masses * forced).sum(-1)
    most = (masses * lists).sum(-1) + own
    layers, heads = masses.shape[:2]
    found = masses.new_zeros(layers, layers, heads, heads)
    for a, b in itertools.combinations_with_replacement(range(layers), 2):
        captured = torch.einsum("hrp,grp->hgr", masses[b], lists[a]) + own[b][:, None]
        shares = captured / most[b][:, None].clamp(min=1e-30)
        found[a, b] = shares.amin(-1) if quantile == 0 else shares.quantile(quantile, -1)
    return found


def weights_of(similar: Tensor, importance: Tensor) -> Tensor:
    """What it is worth that layer `b` reads layer `a`'s lists: `[L, L]`, importance of `b` times its heads' best similarities."""
    return importance * similar.amax(-1).mean(-1)


def best_anchors(weights: Tensor, anchors: int, max_span: int | None = None) -> list[int]:
    """The `anchors` layers, the first among them, with the largest sum of weights, where every layer reads the nearest before it.

    best(k, i) = max over l < i of best(k - 1, l) + sum of weights[l, l .. i - 1].

    Args:
        weights: `[L, L]`, from `weights_of`.
        max_span: layers that read one anchor's lists at most, itself included; None: any number.

    Raises:
        ValueError: a number outside its range, or anchors too few for `max_span`.
    """
    layers = weights.shape[0]
    if not 1 <= anchors <= layers:
        raise ValueError(f"anchors must be 1 to {layers}, the number of layers, got {anchors}")
    span = layers if max_span is None else max_span
    if span < 1 or anchors * span < layers:
        raise ValueError(f"{anchors} anchors of at most {span} layers each do not make {layers}")
    sums = torch.cat([weights.new_zeros(layers, 1), weights.double().cumsum(1)], 1)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for k, i in itertools.product(range(1, anchors + 1), range(1, layers + 1)):
        options = (
            (best[k - 1, a][0] + float(sums[a, i] - sums[a, a]), [*best[k - 1, a][1], a])
            for a in range(max(0, i - span), i)
            if (k - 1, a) in best
        )
        found = max(options, key=lambda option: option[0], default=None)
        if found is not None:
            best[k, i] = found
    return best[anchors, layers][1]


def greedy_anchors(layers: int, anchors: int, loss: Callable[[Sequence[int]], float]) -> tuple[list[int], float]:
    """Anchors, and their loss: one layer after the other, never the first, stops to select, that whose loss is least then.

    Args:
        loss: of a model whose layers of these numbers select, the others reading the nearest before them.
    """
    if not 1 <= anchors <= layers:
        raise ValueError(f"anchors must be 1 to {layers}, the number of layers, got {anchors}")
    current, least = list(range(layers)), float("nan")
    while len(current) > anchors:
        options = [[a for a in current if a != out] for out in current[1:]]
        losses = [loss(option) for option in options]
        least = min(losses)
        current = options[losses.index(least)]
    return current, least
