"""What the attentions of a transformers model look at in a text, page by page, and how much they move the hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.learn.attention_watch import last_shares, watched
from tsa_compile.learn.drift import decoder_layer

Tensor = torch.Tensor


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
        self._attended: dict[str, Tensor] = {}

    def look(self, path: str, q: Tensor, k: Tensor, scale: float) -> None:
        shares = last_shares(q, k, scale, self.rows).mean(1)
        self.masses[path] = F.pad(shares, (0, -k.shape[2] % PAGE)).unflatten(-1, (-1, PAGE)).sum(-1)

    def hooks(self, model: nn.Module, paths: Mapping[nn.Module, str]) -> Iterator[Any]:
        """Hooks that take importances; whoever has them removes them."""
        for module, path in paths.items():
            layer = decoder_layer(path)
            if layer is not None and layer != path:
                yield module.register_forward_hook(self._after_attention(path))
                yield model.get_submodule(layer).register_forward_hook(self._after_layer(path), with_kwargs=True)

    def _after_attention(self, path: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if path in self.masses:
                self._attended[path] = output[0] if isinstance(output, (tuple, list)) else output

        return after

    def _after_layer(self, path: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            attended = self._attended.pop(path, None)
            if x is not None and attended is not None and attended.shape == x.shape:
                before, added = (t[0, -self.rows :].float() for t in (x, attended))
                self.importance[path] = float((1 - F.cosine_similarity(before, before + added, -1)).mean())

        return after


@contextlib.contextmanager
def recorded(model: nn.Module, rows: int) -> Iterator[MassRecorder]:
    """Inside, a forward of `model` on one unpadded text fills the recorder; see `watched`."""
    recorder = MassRecorder(rows)
    hooks: list[Any] = []
    with watched(model, recorder.look) as paths:
        try:
            hooks += recorder.hooks(model, paths)
            yield recorder
        finally:
            for hook in hooks:
                hook.remove()
