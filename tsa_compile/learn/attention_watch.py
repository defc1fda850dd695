"""Shows every attention of a transformers model's forward to a function: rotated queries and keys, by module path."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
Look: TypeAlias = Callable[[str, Tensor, Tensor, float], None]  # path, q [1, H, L, D], k [1, Hk, L, D], scale
NAME = "tsa_watched"
_watch: contextvars.ContextVar[tuple[Mapping[nn.Module, str], Look] | None] = contextvars.ContextVar("tsa_watch", default=None)
_UNKNOWN = ("sliding_window", "softcap", "s_aux")  # what the attention here does not have


@contextlib.contextmanager
def watched(model: nn.Module, look: Look) -> Iterator[Mapping[nn.Module, str]]:
    """Inside, forwards of `model` on one unpadded text show their attentions to `look`; yields the paths that these may have.

    The model is left as it was.

    Raises:
        ValueError: the model's attention cannot be chosen, or has a window, a soft cap or sinks.
    """
    from transformers import AttentionInterface

    known: Any = model
    if not hasattr(known, "set_attn_implementation"):
        raise ValueError(f"{type(model).__name__} is no transformers model whose attention can be chosen")
    AttentionInterface.register(NAME, _attention)
    paths, before = {m: name for name, m in model.named_modules() if hasattr(m, "layer_idx")}, known.config._attn_implementation
    token = _watch.set((paths, look))
    try:
        known.set_attn_implementation(NAME)
        yield paths
    finally:
        known.set_attn_implementation(before)
        _watch.reset(token)


def last_shares(q: Tensor, k: Tensor, scale: float, rows: int) -> Tensor:
    """The softmax of the last rows, float32 `[Hk, G, rows, L]`, of q `[1, H, L, D]` and k `[1, Hk, L, D]`."""
    length = k.shape[2]
    last = q[0, :, -rows:].float().unflatten(0, (k.shape[1], -1))
    own = torch.arange(length - last.shape[2], length, device=k.device)
    hidden = torch.arange(length, device=k.device) > own[:, None]
    return (last @ k[0, :, None].float().mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of one unpadded text, as transformers calls it."""
    watch = _watch.get()
    assert watch is not None
    paths, look = watch
    given = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if given or attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        what = given[0] if given else "a mask, a batch or a cache"
        raise ValueError(f"only causal attention of one text is measured; {type(module).__name__} has {what}")
    look(paths[module], query, key, scaling)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None
