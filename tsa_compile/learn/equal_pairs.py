"""One of several settings for each of many parts, so that together they read no more than there is room for."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def cheapest(cost: Tensor, read: Tensor, room: float) -> Tensor:
    """The setting of each part whose summed cost is least within `room`, by bisection on the price of what is read.

    Args:
        cost, read: `[settings, parts]`, what a setting costs a part and what it reads.
        room: what all parts together may read; where even the least is more, the least is chosen.

    Returns:
        int64 `[parts]`.
    """
    low, high = 0.0, float(cost.max()) / float(read[read > 0].min()) + 1.0
    for _ in range(100):
        price = (low + high) / 2
        chosen = (cost + price * read).argmin(0, keepdim=True)
        low, high = (price, high) if float(read.gather(0, chosen).sum()) > room else (low, price)
    return (cost + high * read).argmin(0)
