"""From the flat arguments of an operator's schema to the types that its check, fake, reference and host function take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.kernels.common.view import length_of
from tsa_compile.kernels.types import KeyBlockRule, Keys, KvView, Operands, Strip, TokenRule, Tokens

Tensor = torch.Tensor
MaybeTensor = Tensor | None
ONE_BLOCK = 1 << 30  # longer than any row: positions are int32


def _are_few(rows: Any, keys: Any, most: int) -> bool:
    """Are these at most so many queries over a cache? Symbols are not asked."""
    return isinstance(rows, int) and isinstance(keys, int) and rows <= most and rows < keys


def select_tokens(
    q: Tensor, k: Tensor, order: MaybeTensor, ranks: MaybeTensor, scale: float, coverage: float, window: int, pool: int,
    min_tokens: int, heavy: int, share: str = "head", min_queries: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Up to `min_queries` queries over a cache keep every key, as a coverage of 0 does. Symbols are not asked."""
    view, rows, keys = KvView.ordered(order, ranks), q.shape[2], k.shape[2]
    if _are_few(rows, keys, min_queries):
        coverage = 0.0
    return Operands(q, k, None, view=view), scale, TokenRule(coverage, window, pool, min_tokens, heavy), share


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, heavy_indices: Tensor, order: MaybeTensor,
    ranks: MaybeTensor, scale: float, strip_window: int, strip_sinks: int, dense_below: int, engine: str, need_lse: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    x, kept = Operands(q, k, v, view=KvView.ordered(order, ranks)), Tokens(indices, counts, heavy_indices)
    return x, kept, scale, Strip(strip_window, strip_sinks), dense_below, engine, need_lse


def token_block_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, heavy_indices: Tensor, order: MaybeTensor,
    ranks: MaybeTensor, scale: float, strip_window: int, strip_sinks: int, alpha: float, pool: int, window: int, sinks: int,
    last_dense: int, share: str, engine: str, need_lse: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    x, kept = Operands(q, k, v, view=KvView.ordered(order, ranks)), Tokens(indices, counts, heavy_indices)
    rule = KeyBlockRule(alpha, pool, window, sinks, last_dense, share)
    return x, kept, scale, Strip(strip_window, strip_sinks), rule, engine, need_lse


def token_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: MaybeTensor, scale: float, coverage: float, window: int, pool: int,
    min_tokens: int, strip_window: int, strip_sinks: int, heavy: int, engine: str,
) -> tuple[Any, ...]:  # fmt: skip
    rule = TokenRule(coverage, window, pool, min_tokens, heavy)
    return Operands(q, k, v, key_mask), scale, rule, Strip(strip_window, strip_sinks), engine


def select_keys(
    q: Tensor, k: Tensor, order: MaybeTensor, ranks: MaybeTensor, scale: float, coverage: float, probes: int, min_keys: int
) -> tuple[Any, ...]:
    return Operands(q, k, None, view=KvView.ordered(order, ranks)), scale, coverage, probes, min_keys


def remember_keys(q: Tensor, k: Tensor, scale: float, queries: int, count: int) -> tuple[Any, ...]:
    return Operands(q, k, None), scale, queries, count


def key_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float, need_lse: bool = False
) -> tuple[Any, ...]:
    return Operands(q, k, v), Keys(indices, counts), scale, need_lse


def bridge_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: MaybeTensor, block: int, start: MaybeTensor, lengths: MaybeTensor,
    key_mask: MaybeTensor, scale: float, width: int, rows: int, sources: int, offset: int, need_lse: bool,
    k_len: int | None = None, min_queries: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Up to `min_queries` queries over a cache read every key before them, in one block of any length. Symbols are not asked."""
    queries, keys = q.shape[2], length_of(k, KvView(blocks, block, None, None), k_len)
    if _are_few(queries, keys, min_queries):
        width, rows, sources, offset = ONE_BLOCK, 0, 0, 0
    return q, k, v, blocks, block, start, lengths, key_mask, scale, width, rows, sources, offset, need_lse, k_len


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Any, ...]:
    return (out, lse), (other, other_lse)


def select_key_blocks(
    q: Tensor, k: Tensor, means: Tensor, counts: Tensor, start: MaybeTensor, lengths: MaybeTensor, key_mask: MaybeTensor,
    scale: float, alpha: Sequence[float], pool: int, window: int, sinks: int, last_dense: int, share: str = "head",
    lookahead: bool = True, k_len: int | None = None, min_queries: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Up to `min_queries` queries over a cache keep every key block, as an alpha of 0 does. Symbols are not asked."""
    rows, keys = q.shape[2], k.shape[2] if k_len is None else k_len
    if _are_few(rows, keys, min_queries):
        alpha = [0.0]
    return q, means, counts, start, lengths, key_mask, keys, scale, alpha, pool, window, sinks, last_dense, share, lookahead


def role_key_blocks(
    q: Tensor, k: Tensor, start: MaybeTensor, lengths: MaybeTensor, local: Sequence[bool], window: int, first_keys: int,
    k_len: int | None = None, min_queries: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Of up to `min_queries` queries over a cache no head is local. Symbols are not asked."""
    keys = k.shape[2] if k_len is None else k_len
    if _are_few(q.shape[2], keys, min_queries):
        local = [False] * len(local)
    return q, k, start, lengths, local, window, first_keys, keys


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: MaybeTensor, block: int, start: MaybeTensor, lengths: MaybeTensor,
    key_mask: MaybeTensor, scale: float, alpha: Sequence[float], pool: int, window: int, sinks: int, last_dense: int,
    share: str = "head", lookahead: bool = True, k_len: int | None = None, min_queries: int = 0, dense_below: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Fewer keys than `dense_below` are all read, as by an alpha of 0; `min_queries` as in `select_key_blocks`."""
    x = Operands(q, k, v, key_mask, KvView(blocks, block, start, lengths))
    rows, keys = q.shape[2], length_of(k, x.view, k_len)
    if _are_few(rows, keys, min_queries) or (isinstance(keys, int) and keys < dense_below):
        alpha = [0.0]
    return x, k_len, scale, alpha, pool, window, sinks, last_dense, share, lookahead
