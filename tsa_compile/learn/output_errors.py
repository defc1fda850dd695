"""What the heads of an attention change in its layer's output: by the projection behind them, where it is found."""

from __future__ import annotations

import torch
from torch import nn

Tensor = torch.Tensor


def output_weight(model: nn.Module, module: str, width: int) -> Tensor | None:
    """The weight `[model width, width]` that attention module `module` (its path) applies to its heads' results, side by side.

    By convention it is the last linear layer there that takes `width` numbers. None: there is none.
    """
    try:
        layers = model.get_submodule(module).modules()
    except AttributeError:  # a path of a graph that is no module's
        return None
    found = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.in_features == width]
    return found[-1].weight.detach() if found else None


class OutputErrors:
    """Errors of one layer's heads as the rest of the model sees them.

    Args:
        exact: `[1, H, L, Dv]`, what dense attention gives.
        weight: `[width, H * Dv]`, of the projection behind it; None: heads count as they are.
    """

    def __init__(self, exact: Tensor, weight: Tensor | None) -> None:
        self._exact = exact[0]
        self._parts = None if weight is None else weight.float().unflatten(1, (exact.shape[1], -1))  # [width, H, Dv]
        if self._parts is None:
            self._whole = self._exact.float().square().sum()
        else:
            together = sum(self._seen(h, self._exact[h].float()) for h in range(exact.shape[1]))
            assert isinstance(together, Tensor)
            self._whole = together.square().sum()

    def of(self, out: Tensor) -> Tensor:
        """For each head, the square of what its error in `out` changes in the layer's output over that of the output:
        float32 `[H]`. Heads whose errors add up count as if they did not."""
        changed = [self._seen(h, x.float() - self._exact[h].float()).square().sum() for h, x in enumerate(out[0])]
        return torch.stack(changed) / self._whole

    def _seen(self, head: int, x: Tensor) -> Tensor:
        return x if self._parts is None else x @ self._parts[:, head].T


def relative_errors(out: Tensor, exact: Tensor) -> Tensor:
    """Norm of each head's difference over its norm: `[1, H, n, Dv]` -> float32 `[H]`."""
    wrong = torch.stack([(x.float() - y.float()).norm() for x, y in zip(out[0], exact[0], strict=True)])
    return wrong / torch.stack([y.float().norm() for y in exact[0]]).clamp_min(1e-30)
