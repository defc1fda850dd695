"""What the attentions of a transformers model look at in a text, page by page, and how much they move the hidden states."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.learn.drift import decoder_layer

Tensor = torch.Tensor
NAME = "tsa_attention_masses"
_recorder: contextvars.ContextVar[MassRecorder | None] = contextvars.ContextVar("tsa_mass_recorder", default=None)
_UNKNOWN = ("sliding_window", "softcap", "s_aux")  # what the recording attention does not have


class MassRecorder:
    """Of each attention of one forward, by its path.

    Args:
        rows: last query rows that are looked at.

    Attributes:
        masses: float32 `[Hk, rows, pages]`: shares of the softmax by page of 16 keys, mean over a KV head's query heads.
        importance: mean over the rows of 1 - cos(x, x + attention), x being what enters the layer.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.masses: dict[str, Tensor] = {}
        self.importance: dict[str, float] = {}
        self.paths: dict[nn.Module, str] = {}
        self._attended: dict[str, Tensor] = {}

    def look(self, path: str, q: Tensor, k: Tensor, scale: float) -> None:
        """Masses of the last rows of q `[1, H, L, D]` over k `[1, Hk, L, D]`."""
        length, kv_heads = k.shape[2], k.shape[1]
        rows = q[0, :, -self.rows :].float().unflatten(0, (kv_heads, -1))
        logits = rows @ k[0, :, None].float().mT * scale
        last = torch.arange(length - rows.shape[2], length, device=k.device)
        logits = logits.masked_fill(torch.arange(length, device=k.device) > last[:, None], -torch.inf)
        shares = F.pad(logits.softmax(-1).mean(1), (0, -length % PAGE))
        self.masses[path] = shares.unflatten(-1, (-1, PAGE)).sum(-1)

    def after_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self.paths and self.paths[module] in self.masses:
            self._attended[self.paths[module]] = output[0] if isinstance(output, (tuple, list)) else output

    def after_layer(self, path: str, x: Tensor) -> None:
        """The layer that holds the attention at `path` has run on `x` `[1, L, width]`."""
        attended = self._attended.pop(path, None)
        if attended is not None and attended.shape == x.shape:
            before, added = (t[0, -self.rows :].float() for t in (x, attended))
            self.importance[path] = float((1 - F.cosine_similarity(before, before + added, -1)).mean())


@contextlib.contextmanager
def recorded(model: nn.Module, rows: int) -> Iterator[MassRecorder]:
    """Inside, forwards of `model` on one unpadded text fill the recorder. The model is left as it was.

    Raises:
        ValueError: the model's attention cannot be chosen, or has a window, a soft cap or sinks.
    """
    from transformers import AttentionInterface

    known: Any = model
    if not hasattr(known, "set_attn_implementation"):
        raise ValueError(f"{type(model).__name__} is no transformers model whose attention can be chosen")
    AttentionInterface.register(NAME, _attention)
    recorder, before = MassRecorder(rows), known.config._attn_implementation
    recorder.paths = {m: name for name, m in model.named_modules() if hasattr(m, "layer_idx")}
    hooks = [m.register_forward_hook(recorder.after_attention) for m in recorder.paths]
    for path in recorder.paths.values():
        layer = decoder_layer(path)
        if layer is not None and layer != path:
            hooks.append(model.get_submodule(layer).register_forward_hook(_layer_hook(recorder, path), with_kwargs=True))
    token = _recorder.set(recorder)
    try:
        known.set_attn_implementation(NAME)
        yield recorder
    finally:
        known.set_attn_implementation(before)
        _recorder.reset(token)
        for hook in hooks:
            hook.remove()


def _layer_hook(recorder: MassRecorder, path: str) -> Any:
    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if x is not None:
            recorder.after_layer(path, x)

    return after


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of one unpadded text, as transformers calls it."""
    recorder = _recorder.get()
    assert recorder is not None
    given = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if given or attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        what = given[0] if given else "a mask, a batch or a cache"
        raise ValueError(f"routes are measured on causal attention of one text; {type(module).__name__} has {what}")
    recorder.look(recorder.paths[module], query, key, scaling)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None
