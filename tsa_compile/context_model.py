"""Which models can compute a part of a prompt's rows, and the cache that such a call has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from tsa_compile.cache.hf_layers import layer_types
from tsa_compile.cache.layer_methods import FullMethods
from tsa_compile.cache.names import CACHES, cache_name
from tsa_compile.cache.shared_prefix import SharedMethods

_MIXES_TOKENS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
_BY_LENGTH = ("dynamic", "longrope")  # kinds of RoPE whose angles depend on the last position of a call


def check_model(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Does nothing but attention bring rows together, and is nothing asked for that one rank cannot give?

    Raises:
        RuntimeError: it does, or gradients are enabled.
        ValueError: attention weights are asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("ContextParallel runs without gradients: call the model under torch.no_grad()")
    config = _text_config(model)
    if given.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError("ContextParallel: output_attentions is asked for, and no rank has the weights of all rows")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    rotary = sorted(set(_rope_types(getattr(config, "rope_parameters", None))) & set(_BY_LENGTH))
    decoder: nn.Module = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else model
    mixing = sorted({type(m).__name__ for m in decoder.modules() if isinstance(m, _MIXES_TOKENS)})
    reasons = [
        f"layers of {sorted(others)}" if others else "",
        f"RoPE of kind {rotary}, which depends on the last position" if rotary else "",
        f"{mixing}, which may read other tokens" if mixing else "",
    ]
    if any(reasons):
        why = ", ".join(filter(None, reasons))
        raise RuntimeError(
            f"ContextParallel is for models whose rows meet in full attention alone; {type(model).__name__} has {why}"
        )


def with_cache(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with a new cache where the model would make one by itself: its layers must become ours."""
    name, config = cache_name(model), getattr(model, "config", None)
    if name is None or config is None or cache_of(given) is not None:
        return given
    use = given.get("use_cache")
    if not (getattr(_text_config(model), "use_cache", False) if use is None else use):
        return given
    from transformers import DynamicCache

    return {**given, name: DynamicCache(config=config)}


def without_rows(model: nn.Module) -> dict[str, Any]:
    """The argument of a call without a cache: one that keeps nothing. With none transformers takes positions that are not next
    to each other for those of several sequences."""
    name, config = cache_name(model), _text_config(model)
    if name is None or config is None:
        return {}
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.layers = [layer_types().passing() for _ in range(config.num_hidden_layers)]
    return {name: cache}


def layers_of(model: nn.Module) -> int:
    """Attentions that a call has at least: one in each layer of a model of transformers."""
    return int(getattr(_text_config(model), "num_hidden_layers", 1))


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments; None: there is none."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)


def check_cache(cache: Any, reasons: Mapping[int, str]) -> None:
    """Are all layers ours, and do they keep every row?

    Raises:
        RuntimeError: they do not.
    """
    others = [n for n, layer in enumerate(cache.layers) if not isinstance(layer, FullMethods) or isinstance(layer, SharedMethods)]
    if others or -1 in reasons:
        why = next(iter(reasons.values()), "they do not keep all rows, or keep requests of this rank alone")
        raise RuntimeError(f"ContextParallel cannot use this cache, layers {others} of {type(cache).__name__}: {why}")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _rope_types(parameters: Any) -> Iterator[str]:
    """Of a config, which may have parameters for each kind of layer."""
    if isinstance(parameters, Mapping):
        for name, value in parameters.items():
            if name in ("rope_type", "type"):
                yield str(value)
            else:
                yield from _rope_types(value)
