"""Which decode steps run on fixed buffers, and which of these are the model's own by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch

from tsa_compile.cache.entry import Prepared
from tsa_compile.cache.fixed import device_of
from tsa_compile.cache.pinned import PinnableRows


def why_not_fixed(model: Any, prepared: Prepared, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why a decode step of `model` does not run on fixed buffers; None: it does."""
    mask = kwargs.get("attention_mask")
    if -1 in prepared.reasons:
        return prepared.reasons[-1]
    if prepared.is_pair:
        return "the cache of an encoder-decoder"
    if not getattr(model, "_can_compile_fullgraph", False):  # transformers: it works with static caches
        return f"{type(model).__name__} does not say that it works with static caches"
    layers = [layer for layer in prepared.cache.layers if isinstance(layer, PinnableRows)]
    if not layers or not layers[0].count():
        return "no layer that keeps all rows, or no row"
    if not all(x.is_compileable for n, x in enumerate(prepared.cache.layers) if n not in prepared.ours):
        return "a layer of the cache that is not ours"
    if any(x.count() != layers[0].count() for x in layers):
        return "layers of several lengths"
    if layers[0].keeping is not None and len(set(map(device_of, layers))) > 1:
        return "layers on several devices, which keep their rows elsewhere too"
    if len(args) > 1 or (mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2)):
        return "a mask that is not [batch, tokens], or arguments without names"
    config = getattr(model, "config", None)
    if layers[0].lengths is not None and getattr(config, "_attn_implementation", None) != "sdpa":
        return "batch rows of different lengths, in an attention implementation that is not sdpa"
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        return "attention weights are asked for"
    return None


def why_own_step(layers: Sequence[Any], recorded_on: Set[str], pays_from: int) -> str | None:
    """Why a step over a cache of ours is the model's own by default; None: it is recorded and replayed.

    Args:
        layers: of the cache, with rows.
        recorded_on: kinds of device where steps are recorded.
        pays_from: rows from which on it pays.
    """
    if not all(isinstance(layer, PinnableRows) for layer in layers):
        return "a layer with a window"
    devices = set(map(device_of, layers))
    if len(devices) > 1 or devices.pop().type not in recorded_on:
        return "no one device where steps are recorded"
    return f"below {pays_from} cached tokens" if layers[0].count() < pays_from else None
