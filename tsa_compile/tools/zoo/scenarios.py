"""How a model is called: with and without a cache, whole or in chunks, padded, packed, and by `generate()`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsa_compile.tools.zoo.entries import LENGTH, Entry, NotOffered, ids

LENGTHS = (LENGTH, 200)  # the second makes lengths symbols of the graph, and is of two blocks of query rows
CHUNK = 17  # more rows than a verify step has
CACHE = 64


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Calls of a model.

    Args:
        name: what is done.
        prefills: how many graphs it traces in which the model's causal attentions must be replaced.
        run: makes the calls; returns the output of each, without the rows that are padding.
        sparse: also compared with the eager reference, which needs a graph for each call.
        long: its last prompt is so long that a policy by blocks leaves keys out.
        counted: graphs and graph breaks are compared with those of the model compiled without us.
    """

    name: str
    prefills: int
    run: Callable[[nn.Module, Entry], list[Tensor]]
    sparse: bool = True
    long: bool = False
    counted: bool = False


def _logits(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    return model(input_ids=tokens, **kwargs).logits


def prefill(model: nn.Module, entry: Entry) -> list[Tensor]:
    return [_logits(model, ids(n)["input_ids"], use_cache=False) for n in LENGTHS]


def _dynamic_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def prefill_dynamic_cache(model: nn.Module, entry: Entry) -> list[Tensor]:
    return [_logits(model, ids(n)["input_ids"], past_key_values=_dynamic_cache(model), use_cache=True) for n in LENGTHS]


def prefill_static_cache(model: Any, entry: Entry) -> list[Tensor]:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    return [_logits(model, ids()["input_ids"], past_key_values=cache, use_cache=True)]


def chunked_prefill(model: nn.Module, entry: Entry) -> list[Tensor]:
    cache, tokens = _dynamic_cache(model), ids(3 * CHUNK)["input_ids"]
    return [_logits(model, part, past_key_values=cache, use_cache=True) for part in tokens.split(CHUNK, 1)]


def decode(model: nn.Module, entry: Entry) -> list[Tensor]:
    cache, tokens = _dynamic_cache(model), ids()["input_ids"]
    return [_logits(model, part, past_key_values=cache, use_cache=True) for part in tokens.split([LENGTH - 2, 1, 1], 1)]


def _padded(side: str, lengths: tuple[int, ...]) -> Callable[[nn.Module, Entry], list[Tensor]]:
    """Two rows, the second half as long."""

    def run(model: nn.Module, entry: Entry) -> list[Tensor]:
        outputs = []
        for n in lengths:
            tokens, mask = ids(n, batch=2)["input_ids"], torch.ones(2, n, dtype=torch.long)
            hidden = slice(0, n // 2) if side == "left" else slice(n // 2, n)
            tokens[1, hidden], mask[1, hidden] = 0, 0
            extra = {}
            if entry.kind == "decoder" and _takes(model, "position_ids"):
                extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            output = _tensors(model(input_ids=tokens, attention_mask=mask, **extra))[0]
            outputs.append(output[mask.bool()])
        return outputs

    return run


def packed(model: nn.Module, entry: Entry) -> list[Tensor]:
    """Two sequences in one row, told apart by their position ids."""
    if not _takes(model, "position_ids"):
        raise NotOffered("takes no position_ids")
    tokens, first = ids()["input_ids"], LENGTH - 18
    positions = torch.cat([torch.arange(first), torch.arange(18)])[None]
    output = _logits(model, tokens, position_ids=positions, use_cache=False)
    if model._compiled_call_impl is None:
        alone = _logits(model, tokens[:, first:], use_cache=False)
        if not torch.allclose(output[:, first:], alone, atol=1e-3):
            raise NotOffered("does not tell packed sequences apart")
    return [output]


def generate(model: Any, entry: Entry) -> list[Tensor]:
    inputs = {name: x for name, x in entry.inputs().items() if name != "decoder_input_ids"}
    return [model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)]


def call(model: nn.Module, entry: Entry) -> list[Tensor]:
    return [torch.cat([x.flatten() for x in _tensors(model(**entry.inputs()))])]


def calls(model: nn.Module, entry: Entry) -> list[Tensor]:
    return [_tensors(model(**ids(n)))[0] for n in LENGTHS]


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _tensors(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


_CALL = Scenario("call", 1, call, counted=True)
_GENERATE = Scenario("generate", 1, generate, sparse=False)
SCENARIOS: dict[str, tuple[Scenario, ...]] = {
    "decoder": (
        Scenario("prefill", 2, prefill, long=True, counted=True),
        Scenario("prefill, dynamic cache", 2, prefill_dynamic_cache, long=True, counted=True),
        Scenario("prefill, static cache", 1, prefill_static_cache),
        Scenario("chunked prefill", 3, chunked_prefill, counted=True),
        Scenario("decode", 1, decode),
        Scenario("left padding", 2, _padded("left", LENGTHS), long=True, counted=True),
        Scenario("right padding", 1, _padded("right", LENGTHS[:1])),
        Scenario("packed sequences", 0, packed),
        _GENERATE,
    ),
    "encoder": (
        Scenario("call", 2, calls, counted=True),
        Scenario("left padding", 1, _padded("left", LENGTHS[:1])),
        Scenario("right padding", 1, _padded("right", LENGTHS[:1])),
    ),
    "plain": (Scenario("prefill", 2, lambda model, entry: [model(**ids(n)) for n in LENGTHS], long=True, counted=True),),
    "seq2seq": (_CALL, dataclasses.replace(_GENERATE, prefills=0)),
    "call": (_CALL,),
}
