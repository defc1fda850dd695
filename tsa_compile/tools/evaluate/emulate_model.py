"""Runs a language model of transformers with an attention of our choice, to see what a rule costs before it has a kernel."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile.tools.evaluate.local_attention import local_attention

Tensor = torch.Tensor
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer in a run of one text, without padding.

    Args:
        index: number of the layer.
        q: [H, n, D], the last n of the L positions. k: [Hk, L, D]. v: [Hk, L, Dv].
        scale: factor of the scores.
        window: keys that a row of a sliding-window layer sees, its own included; None: all before it.
        rotation: cosines and sines of the rotary embedding at the n positions, [n, D] each; None: the layer has none.
        output: weight of the output projection, [model width, H * Dv].
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None
    rotation: tuple[Tensor, Tensor] | None
    output: Tensor

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.q.shape[0] // self.k.shape[0]


Attend = Callable[[Layer], Tensor]  # -> [H, n, Dv]


def dense(layer: Layer) -> Tensor:
    """Exact causal attention of a prefill (n = L), [H, n, Dv]."""
    q, k, v = layer.q[None], layer.k[None], layer.v[None]
    if layer.window is not None and q.shape[2] > layer.window:
        return local_attention(q, k, v, layer.window, layer.scale)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True)[0]


def load_model(path: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder of safetensors, a packaged name or a Hugging Face id; bfloat16 on a GPU, else float32."""
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return load_causal_lm(str(path), dtype), load_tokenizer(str(path))


class Emulator:
    """A model whose attention is what `run` is told; everything else is the model's own.

    Raises:
        ValueError: the attention has a part that the emulation leaves out (softcap, sinks in the softmax).
    """

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        name = f"tsa_emulate_{next(_NUMBERS)}"
        AttentionInterface.register(name, self._attention)  # without a mask of that name the model makes none
        model.set_attn_implementation(name)
        self.model, self.decoder, self.head = model, model.get_decoder(), model.get_output_embeddings()
        self.device = next(model.parameters()).device
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._attend: Attend = dense
        self._rotation: tuple[Tensor, Tensor] | None = None
        for module in self.decoder.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "o_proj"):
                module.register_forward_pre_hook(self._remember_rotation, with_kwargs=True)

    @torch.no_grad()
    def run(self, ids: Tensor, attend: Attend, first: int = 0, precision: str = "high") -> Tensor:
        """Hidden states [n, width] of ids [n] at positions `first` and on; `attend` is called for every layer, in order.

        Args:
            precision: of float32 products; "high" is TF32, in which products of bfloat16 numbers are exact.
        """
        self._attend = attend
        torch.set_float32_matmul_precision(precision)
        positions = torch.arange(first, first + ids.shape[0], device=self.device)[None]
        out = self.decoder(input_ids=ids[None].to(self.device), position_ids=positions, use_cache=False)
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, width] -> logits [n, vocabulary], float32."""
        logits = self.head(hidden).float()
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    @property
    def depth(self) -> int:
        return int(self.decoder.config.num_hidden_layers)

    def _remember_rotation(self, module: Any, args: Any, kwargs: Any) -> None:
        self._rotation = kwargs.get("position_embeddings")

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        for part in ("softcap", "s_aux"):
            if kwargs.get(part) is not None:
                raise ValueError(f"the emulation has no {part}, which {type(module).__name__} uses")
        if query.shape[0] != 1 or attention_mask is not None:
            raise ValueError(f"the emulation runs one text without a mask, got a batch of {query.shape[0]}")
        rotation = None if self._rotation is None else (self._rotation[0][0], self._rotation[1][0])
        window, weight = kwargs.get("sliding_window"), module.o_proj.weight
        layer = Layer(module.layer_idx, query[0], key[0], value[0], scaling, window, rotation, weight)
        out = self._attend(layer).to(query.dtype)
        return out.transpose(0, 1)[None].contiguous(), None
