"""The functions behind the operators, called with the flat arguments of a test's case: q, k, v, lists, a key mask, numbers.

Attention functions return the result alone; `with_lse(f)` is `f` that returns (out, lse) instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tsa_compile.kernels import compose, compose_reference, ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.attend.keys import host as keys_host
from tsa_compile.kernels.attend.keys import reference as keys_reference
from tsa_compile.kernels.attend.tokens import host as tokens_host
from tsa_compile.kernels.attend.tokens import packed
from tsa_compile.kernels.attend.tokens import reference as tokens_reference
from tsa_compile.kernels.common.padding import attend_padding
from tsa_compile.kernels.types import KeyBlockRule, Keys, KvView, Operands, Strip, TokenRule, Tokens

Tensor = torch.Tensor


def order(mask: Tensor | None) -> tuple[Any, Any]:
    """(order, ranks) of a mask, as operators take them."""
    return (None, None) if mask is None else torch.ops.tsa.key_view(mask)


def operands(q: Tensor, k: Tensor, v: Tensor | None = None, mask: Tensor | None = None) -> Operands:
    return Operands(q, k, v, mask, KvView.ordered(*order(mask)))


def _select_tokens(f, q, k, mask, scale, *rule, share="head"):
    return f(operands(q, k, None, mask), scale, TokenRule(*rule), share)


def _select_keys(f, q, k, mask, scale, coverage, probes, min_keys):
    return f(operands(q, k, None, mask), scale, coverage, probes, min_keys)


def _sparse(f, q, k, v, indices, counts, heavy, mask, scale, window, sinks, dense_below, engine="auto", **rest):
    kept = Tokens(indices, counts, heavy)
    return f(operands(q, k, v, mask), kept, scale, Strip(window, sinks), dense_below, engine, **rest)


def _packed(f, q, k, v, indices, counts, heavy, mask, scale, window, sinks, **rest):
    x = operands(q, k, v, mask)
    result = f(x, Tokens(indices, counts, heavy), scale, Strip(window, sinks), **rest)
    attend_padding(x, result, scale)  # as host.sparse_attention does after every engine
    return result


def _keys(f, q, k, v, indices, counts, scale, **rest):
    return f(operands(q, k, v), Keys(indices, counts), scale, **rest)


def _blocks(f, q, k, v, indices, counts, heavy, mask, scale, window, sinks, rule, engine="auto", **rest):
    kept = Tokens(indices, counts, heavy)
    return f(operands(q, k, v, mask), kept, scale, Strip(window, sinks), KeyBlockRule(*rule), engine, **rest)


def _out(flat, f):
    @functools.wraps(flat)
    def call(*args, **kwargs):
        return flat(f, *args, **kwargs)[0]

    call.both = lambda *args, **kwargs: flat(f, *args, need_lse=True, **kwargs)
    return call


def with_lse(function):
    return function.both


select_tokens = functools.partial(_select_tokens, compose.select_tokens)
select_tokens_reference = functools.partial(_select_tokens, compose_reference.select_tokens_reference)
select_keys = functools.partial(_select_keys, compose.select_keys)
select_keys_reference = functools.partial(_select_keys, compose_reference.select_keys_reference)
sparse_attention = _out(_sparse, tokens_host.sparse_attention)
sparse_attention_reference = _out(_sparse, tokens_reference.sparse_attention_reference)
packed_attention = _out(_packed, packed.packed_attention)
key_attention = _out(_keys, keys_host.key_attention)
key_attention_reference = _out(_keys, keys_reference.key_attention_reference)
token_block_attention = _out(_blocks, compose.token_block_attention)
token_block_attention_reference = _out(_blocks, compose_reference.token_block_attention_reference)
