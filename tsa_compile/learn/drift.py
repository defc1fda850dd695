"""Drift: how far each decoder layer moves its hidden states (arXiv 2602.03216, section 4).

R_l = mean_t ||h_{l+1,t} - h_{l,t}|| / (||h_{l,t}|| + 1e-8), in float32. The paper makes the half of the layers with the
lowest drift sparse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


def decoder_layer(module: str) -> str | None:
    """Path of the layer that holds an attention: up to the first number of its path, the site's layer number.

    "model.layers.3.self_attn" -> "model.layers.3"; None if the path has no number.
    """
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return None


@contextlib.contextmanager
def record_drift(model: nn.Module, layers: Mapping[str, str]) -> Iterator[dict[str, float]]:
    """Inside, every forward of `model` writes the drift of each of `layers` (name -> path) into the dict yielded.

    A layer's hidden states are its first tensor argument and its (first) output. A layer whose two differ in shape, such
    as one that is no residual block, has no drift and is left out.
    """
    drift: dict[str, float] = {}

    def hook(name: str) -> Any:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            after = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
                moved = (after.float() - before.float()).norm(dim=-1) / (before.float().norm(dim=-1) + 1e-8)
                drift[name] = moved.mean().item()

        return observe

    handles = [model.get_submodule(path).register_forward_hook(hook(n), with_kwargs=True) for n, path in layers.items()]
    try:
        yield drift
    finally:
        for handle in handles:
            handle.remove()
