"""The two graphs of a causal language model that a server runs: prefill (token-sparse) and decode (dense).

Prefill takes a whole prompt and gives the last position's logits and the cache; decode takes one token and that cache. Both
have plain tensors as inputs and outputs: `past.0.key`, `past.0.value`, `past.1.key`, ... in, `present.0.key`, ... out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from tsa_compile.export.common import require
from tsa_compile.plan import Plan

GRAPHS = ("prefill", "decode")


class Graph(NamedTuple):
    """What an export of one graph is given: a module, example inputs, their dynamic sizes, and names for both sides."""

    module: nn.Module
    args: tuple[torch.Tensor, ...]
    dynamic_shapes: Any
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


def plan_within(plan: Plan) -> Plan:
    """A plan for a model as a plan for its graphs' modules, in which the model is called `model`."""
    rules = tuple(r if isinstance(r.modules, int) else r._replace(modules=f"model.{r.modules}") for r in plan.rules)
    return dataclasses.replace(plan, rules=rules)


class Prefill(nn.Module):
    """input_ids [B, L] -> logits [B, 1, vocabulary] of the last position, then keys and values [B, Hk, L, D] of each layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = _new_cache()
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits, *_tensors(cache)


class Decode(nn.Module):
    """input_ids [B, 1] and the cache of P tokens -> logits [B, 1, vocabulary] and the cache of P + 1 tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = _new_cache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return out.logits, *_tensors(cache)


def language_graph(model: Any, graph: str = "prefill", tokens: int = 512, batch: int = 2) -> Graph:
    """The `graph` of `model`, a transformers causal language model, with example inputs of `batch` rows of `tokens` tokens.

    Batch and length are dynamic.

    Raises:
        ValueError: unknown graph.
    """
    if graph not in GRAPHS:
        raise ValueError(f"graph must be one of {GRAPHS}, got {graph!r}")
    config = model.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (batch, tokens), device=model.device)
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        past = Prefill(model)(ids)[1:]
    names = [f"{i}.{part}" for i in range(len(past) // 2) for part in ("key", "value")]
    outputs = ("logits", *(f"present.{name}" for name in names))
    if graph == "prefill":
        return Graph(Prefill(model), (ids,), ({0: free, 1: free},), ("input_ids",), outputs)
    shapes = ({0: free}, tuple({0: free, 2: free} for _ in past))
    return Graph(Decode(model), (ids[:, :1], *past), shapes, ("input_ids", *(f"past.{name}" for name in names)), outputs)


def _new_cache() -> Any:
    return require("transformers", "hf").DynamicCache()


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]
