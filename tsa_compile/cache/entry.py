"""Before a call of a transformers model: the layers of an empty `DynamicCache` among its arguments become ours, in place."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tsa_compile.cache.buffered import Buffered
from tsa_compile.cache.hf_layers import layer_types
from tsa_compile.cache.kv_state import KvState
from tsa_compile.cache.layer_methods import LayerMethods
from tsa_compile.cache.lease import Lease, as_rows
from tsa_compile.cache.storage import Pool

StatesFor = Callable[[int], tuple[KvState, ...]]


class Prepared(NamedTuple):
    """What became of the cache of one call.

    Args:
        cache: the cache whose layers are (also) ours; None: the call has none.
        ours: numbers of the layers that are ours.
        reasons: why others are left as they are, by layer number; -1: the whole cache.
        is_pair: it is the decoder's half of an encoder-decoder's cache.
    """

    cache: Any
    ours: tuple[int, ...]
    reasons: dict[int, str]
    is_pair: bool = False


NO_CACHE = Prepared(None, (), {-1: "the call has no transformers cache"})


def no_states(layer: int) -> tuple[KvState, ...]:
    return ()


def prepare(
    args: Sequence[Any], kwargs: Mapping[str, Any], pool: Pool, states_for: StatesFor = no_states, keeping: Any = None
) -> Prepared:
    """Call this before each forward of a model, with its arguments; no method of the model is touched.

    Args:
        args: the call's positional arguments.
        kwargs: its keyword arguments; the cache is found by its type, as its name differs between versions.
        pool: where the cache's storage is leased.
        states_for: kinds of state for the layer of this number.
        keeping: how layers keep rows beside their buffers (`Policy.keeping`); None: the buffers hold all.
    """
    cache = _cache_of([*args, *kwargs.values()])
    if cache is None:
        return NO_CACHE
    is_pair = hasattr(cache, "self_attention_cache")  # of an encoder-decoder; the other one is written once
    cache = cache.self_attention_cache if is_pair else cache
    if torch.is_grad_enabled():
        _give_up(cache)
    reason = _left_alone(cache)
    if reason is None:
        take_over(cache, pool, states_for, keeping)
    ours = tuple(n for n, layer in enumerate(cache.layers) if isinstance(layer, Buffered))
    for n in ours:
        if isinstance(cache.layers[n], layer_types().full):
            cache.layers[n].keep(states_for(n))  # made before anyone knew what is kept, or for another plan
    mask = kwargs.get("decoder_attention_mask" if is_pair else "attention_mask")
    _settle([cache.layers[n] for n in ours], mask, kwargs.get("position_ids"))
    reasons = {} if reason is None or ours else {-1: reason}
    reasons |= {
        n: _reason_of(layer) for n, layer in enumerate(cache.layers) if not isinstance(layer, Buffered) and -1 not in reasons
    }
    return Prepared(cache, ours, reasons, is_pair)


def take_over(cache: Any, pool: Pool, states_for: StatesFor = no_states, keeping: Any = None) -> None:
    """Turn the attention layers of an empty `DynamicCache` into ours, with these kinds of state; others stay."""
    lease, types = Lease(pool), layer_types()
    full = types.that_keep(keeping)
    for n, layer in enumerate(cache.layers):
        is_unused = isinstance(layer, types.full) and layer.buffers is None and layer.count() == 0
        if type(layer) is types.full.plain or (is_unused and layer.keeping != keeping):
            cache.layers[n] = full(lease=lease, states=states_for(n))
        elif type(layer) is types.sliding.plain:
            cache.layers[n] = types.sliding(lease=lease, sliding_window=layer.sliding_window)
            cache.layers[n].record_past = layer.record_past
    if cache.layer_class_to_replicate is types.full.plain:
        cache.layer_class_to_replicate = functools.partial(_new_layer, full, lease, states_for)


def _give_up(cache: Any) -> None:
    """Layers of ours become those of transformers again, with the same rows: autograd forbids writes in place."""
    types = layer_types()
    for n, layer in enumerate(cache.layers):
        if isinstance(layer, LayerMethods):
            cache.layers[n] = layer.as_plain()
            layer.release()
    if isinstance(cache.layer_class_to_replicate, functools.partial):
        cache.layer_class_to_replicate = types.full.plain


def _new_layer(full: Callable[..., Any], lease: Lease, states_for: StatesFor) -> Any:
    """A layer for a cache that was made without a config, and makes its layers as they are called."""
    return full(lease=lease, states=states_for(lease.layers))


def _cache_of(values: Sequence[Any]) -> Any:
    if "transformers" not in sys.modules:
        return None
    from transformers.cache_utils import Cache, EncoderDecoderCache

    return next((x for x in values if isinstance(x, (Cache, EncoderDecoderCache))), None)


def _left_alone(cache: Any) -> str | None:
    """Why no layer of this cache is turned; None: they are."""
    from transformers.cache_utils import DynamicCache

    if type(cache) is not DynamicCache:
        return f"{type(cache).__name__} is no DynamicCache"
    if getattr(cache, "offloading", False):
        return "the cache is offloaded to the host"
    if torch.is_grad_enabled():
        return "gradients are enabled: rows must not be written in place"
    if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
        return "the cache is not empty"
    return None


def _reason_of(layer: Any) -> str:
    return f"a layer of {type(layer).__name__} is not one of plain or sliding-window attention"


def _settle(layers: list[Any], attention_mask: Any, positions: Any) -> None:
    """What a traced call left goes into the buffers; the padding mask and positions of this call are the states'."""
    for layer in layers:
        layer.settle()
    is_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
    placed = as_rows(positions)
    if placed is not None and any(layer.states.placed for layer in layers):
        placed = placed.clone()  # it is read when the rows are, at the next call
    for lease in {id(layer.lease): layer.lease for layer in layers}.values():
        lease.positions, lease.numbered = placed, positions is None
        if is_padding:
            lease.key_mask = attention_mask.bool()
        elif not any(layer.length for layer in layers):
            lease.key_mask = None
