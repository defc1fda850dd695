"""The fewest entries that hold a share of a sum, without sorting: bisection on the bits of the least entry that is taken."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def top_p(x: Tensor, mass: float | Tensor) -> Tensor:
    """bool, like `x`: along the last dim the fewest entries that hold `mass` of its sum; of equal ones the first.

    Args:
        x: float32, not negative; what is not finite counts as 0.
        mass: in [0, 1], 0: none; or such numbers `[..., 1]`.
    """
    x = torch.where(x.isfinite(), x, 0.0).contiguous()
    bits = x.view(torch.int32)  # as integers the bits of such floats keep their order
    wanted = x.sum(-1, dtype=torch.float64, keepdim=True) * mass
    low = torch.full_like(wanted, -1, dtype=torch.int32)  # all that is above holds enough
    high = bits.amax(-1, keepdim=True)  # what is above does not
    for _ in range(32):
        middle = low + torch.div(high - low, 2, rounding_mode="floor")
        enough = torch.where(bits > middle, x, 0.0).sum(-1, dtype=torch.float64, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above, at = bits > high, bits == high
    missing = wanted - torch.where(above, x, 0.0).sum(-1, dtype=torch.float64, keepdim=True)
    need = torch.ceil(missing / high.view(torch.float32).clamp_min(1e-45).double())
    return above | (at & (at.cumsum(-1) <= need) & (x > 0))
