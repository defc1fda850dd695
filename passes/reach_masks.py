"""Reachability over masks of any form, by boolean products: for lists that no period describes, on short sequences.

`check_reach` is exact at any length, for periodic edges; this takes any mask, such as what a selection chose for one input.
Source: "Locality Does Not Imply Reachability", arXiv 2606.02680, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def reach_of_masks(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Which positions each position can depend on after all `layers`, the first layer first.

    A layer is a product from the left, `R_l = R_{l-1} or A_l R_{l-1}`: the order of layers counts. Cost: n^3 each.

    Args:
        layers: bool `[n, n]`, true where the row's position reads the column's; the position itself always counts.

    Returns:
        bool `[n, n]`, row: the position, column: what it can depend on.

    Raises:
        ValueError: no layers, or masks that are not square, bool and of one size.
    """
    sizes = {tuple(mask.shape) for mask in layers}
    if len(sizes) != 1 or any(mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != torch.bool for mask in layers):
        raise ValueError(f"layers must be bool [n, n] of one size, at least one, got {[tuple(m.shape) for m in layers]}")
    found = torch.eye(layers[0].shape[0], dtype=torch.bool, device=layers[0].device)
    for mask in layers:
        found = found | (mask.float() @ found.float() > 0)
    return found
