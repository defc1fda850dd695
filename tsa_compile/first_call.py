"""A first call that carries a prompt and proposed tokens, taken apart into a prefill and a verification.

transformers' assisted and lookup decoding send prompt and candidates together, asking for `logits_to_keep = m > 1` logits: those
of the prompt's last token and of m - 1 candidates. As one prefill, the candidates would choose which keys the prompt reads, and
be sparse themselves: the tokens would differ from those of decoding without candidates. In two calls the second is a verify step,
which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tsa_compile.cache.names import CACHES

_TOKENS = ("input_ids", "inputs_embeds")
_BY_TOKEN = frozenset({"position_ids", "cache_position", "token_type_ids", "mm_token_type_ids"})  # last dimension: tokens


def parts(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The arguments of the two calls that stand for one; None: it is to be run as it is.

    Taken apart are calls that fill a cache, of more rows than logits are asked for. What belongs to the prompt alone, such as
    images, goes to the first.
    """
    rows, logits = _rows(kwargs), kwargs.get("logits_to_keep")
    fills_cache = kwargs.get("use_cache") is not False and any(kwargs.get(name) is not None for name in CACHES)
    if type(logits) is not int or not fills_cache or not 1 < logits < rows or kwargs.get("output_attentions"):
        return None
    if kwargs.get("return_dict") is False:
        return None
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return None  # a mask of queries and keys, made by someone who knows both
    proposed = logits - 1
    first, second = dict(kwargs), dict(kwargs)
    for name, value in kwargs.items():
        if name == "attention_mask" and value is not None:  # of the keys: all of them for the second
            first[name] = value[:, :-proposed]
        elif name in _TOKENS and isinstance(value, torch.Tensor):
            first[name], second[name] = value[:, : rows - proposed], value[:, rows - proposed :]
        elif name in _BY_TOKEN and isinstance(value, torch.Tensor):
            first[name], second[name] = value[..., : rows - proposed], value[..., rows - proposed :]
        elif isinstance(value, torch.Tensor):
            del second[name]
    return {**first, "logits_to_keep": 1}, {**second, "logits_to_keep": proposed}


def joined(first: Any, second: Any) -> Any:
    """The output of the one call from those of the two: the second's, with the first's logits and hidden states before them."""
    second.logits = torch.cat([first.logits, second.logits], 1)
    if getattr(second, "hidden_states", None) is not None:
        pairs = zip(first.hidden_states, second.hidden_states, strict=True)
        second.hidden_states = tuple(torch.cat(pair, 1) for pair in pairs)
    return second


def _rows(kwargs: Mapping[str, Any]) -> int:
    tokens = next((kwargs[name] for name in _TOKENS if isinstance(kwargs.get(name), torch.Tensor)), None)
    return tokens.shape[1] if tokens is not None and tokens.dim() >= 2 else 0
