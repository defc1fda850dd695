"""How many tokens a call of a model has, by the names that transformers has for its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tsa_compile.cache.names import CACHES

_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")


def prompt_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Tokens of a call over no keys of its past; 0: unknown, or there may be such keys."""
    caches = [kwargs.get(name) for name in CACHES]
    if len(args) > 1 or any(x is not None and not (hasattr(x, "get_seq_length") and x.get_seq_length() == 0) for x in caches):
        return 0
    return rows_of(args, kwargs)


def is_decode_step(kwargs: Mapping[str, Any]) -> bool:
    """Is it a call with one token, by the names that transformers has for them?"""
    return _rows(_tokens(kwargs)) == 1


def _tokens(kwargs: Mapping[str, Any]) -> Any:
    return next((kwargs[name] for name in _TOKENS if kwargs.get(name) is not None), None)


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Tokens of each batch row of a call; 0: unknown."""
    return _rows(args[0] if args else _tokens(kwargs))


def _rows(tokens: Any) -> int:
    """Tokens of each batch row; 0: unknown."""
    return tokens.shape[1] if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2 else 0


def fix_rows(tensor: Any, rows: int) -> None:
    """A graph for just so many tokens: policies take a fixed number of query rows."""
    if isinstance(tensor, torch.Tensor) and rows > 1:
        for dim in range(1, tensor.dim()):
            if tensor.shape[dim] == rows:
                torch._dynamo.mark_static(tensor, dim)
