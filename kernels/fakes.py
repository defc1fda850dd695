"""What operators return, uninitialised: the shapes, dtypes and strides of docs/operators.md, for tracing."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.kernels.common.page_basis import empty_basis
from tsa_compile.kernels.common.pages import CHUNK, empty_index, pages_of
from tsa_compile.kernels.common.results import empty_result, no_lse, score_dtype
from tsa_compile.kernels.common.row_blocks import key_block_count, row_block_count, word_count
from tsa_compile.kernels.common.view import length_of
from tsa_compile.kernels.select.top_pages.budget import list_capacity
from tsa_compile.kernels.types import KvView, Operands, TokenRule

Tensor = torch.Tensor


def attention(x: Operands, *rest: Any) -> tuple[Tensor, Tensor]:
    """The results of every attention; the last argument says whether the log-sum-exp is needed."""
    lse = x.q.new_empty(x.q.shape[:3], dtype=torch.float32) if rest[-1] else no_lse(x.q)
    return empty_result(x.q, x.v), lse


def token_sparse_attention(x: Operands, *rest: Any) -> Tensor:
    return empty_result(x.q, x.v)


def materialize(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def key_view(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    return _int32(key_mask, *key_mask.shape), _int32(key_mask, *key_mask.shape)


def select_tokens(x: Operands, scale: float, rule: TokenRule, share: str) -> tuple[Tensor, Tensor, Tensor]:
    q, (batch, heads), (kv_heads, k_len) = x.q, x.q.shape[:2], x.k.shape[1:3]
    lists = heads if share == "head" else kv_heads
    return _int32(q, batch, lists, k_len), _int32(q, batch), _int32(q, batch, lists, rule.heavy)


def select_keys(x: Operands, *rest: Any) -> tuple[Tensor, Tensor]:
    return _int32(x.q, *x.q.shape[:2], x.k.shape[2]), _int32(x.q, x.q.shape[0])


def remember_keys(x: Operands, scale: float, queries: int, count: int) -> tuple[Tensor, Tensor]:
    rows, (kv_heads, k_len) = x.q.shape[2], x.k.shape[1:3]
    return _int32(x.q, x.q.shape[0], kv_heads, torch.sym_min(count, k_len - rows) + rows), _int32(x.q, x.q.shape[0])


def merge(part: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = part
    return empty_result(out, out), torch.empty_like(lse, memory_format=torch.contiguous_format)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block: int, *rest: Any, scores: bool = False, **masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scores = rest[9] if len(rest) > 9 else scores
    (batch, heads), capacity = q.shape[:2], k.shape[2] if blocks is None else blocks.shape[1] * block
    return *page_attention(q, k, v), q.new_empty(batch, heads, 2 if scores else 0, capacity, dtype=score_dtype(q.dtype))


def page_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **masks: Any) -> tuple[Tensor, Tensor]:
    return empty_result(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def sampled_value_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **masks: Any) -> tuple[Tensor, Tensor]:
    return page_attention(q, k, v)


def attach_state(state: Tensor, k: Tensor) -> None:
    """It does nothing, on any device: it tells the passes, in a traced graph, that `state` is kept beside the buffer `k`."""


def attach_rows(mark: Tensor, lengths: Tensor, mask: Tensor, start: Tensor | None, k: Tensor) -> None:
    """It does nothing, on any device: it tells the passes, in a traced graph, what `mask` says of the buffer `k`."""


def append_pages(*args: Any) -> None:
    """It writes in place."""


def crop_list(*args: Any) -> None:
    """It writes in place."""


def list_keys(*args: Any) -> None:
    """It writes in place."""


def append_teams(*args: Any) -> None:
    """It writes in place."""


def page_teams(k: Tensor, *rest: Any) -> Tensor:
    return k.new_empty(*k.shape[:2], pages_of(k.shape[2]), dtype=torch.int64)


def page_sums(k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_index(k)


def page_scores(q: Tensor, sums: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    pages = pages_of(rest[-2])
    new = lambda n: q.new_empty(*q.shape[:3], n, dtype=torch.float32)  # noqa: E731
    return new(pages), new((pages + CHUNK - 1) // CHUNK)


def page_basis(k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_basis(k)


def refine_scores(q: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), q.new_empty(*logits.shape[:3], (logits.shape[3] + CHUNK - 1) // CHUNK, dtype=torch.float32)


def complete_pages(out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return merge((out, lse), (out, lse))


def select_pages(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kv_heads, keep, table, mass, sinks, recent = rest[-6:]
    size = list_capacity(logits.shape[3], keep, table, mass, sinks + recent)
    return _int32(logits, logits.shape[0], kv_heads, size), _int32(logits, logits.shape[0], kv_heads)


def projected_scores(q: Tensor, index: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    pages = pages_of(index.shape[2])
    new = lambda n: q.new_empty(*index.shape[:2], 1, n, dtype=torch.float32)  # noqa: E731
    return new(pages), new((pages + CHUNK - 1) // CHUNK)


def join_pages(
    indices: Tensor, list_counts: Tensor, start: Any, lengths: Any, capacity: int, owners: Any, sinks: Any, recent: Any
) -> tuple[Tensor, Tensor]:
    return _int32(indices, indices.shape[0], len(recent), pages_of(capacity)), _int32(indices, indices.shape[0], len(recent))


def routed_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return page_attention(q, k, v)


def routed_pages(
    q: Tensor, sums: Tensor, counts: Tensor, start: Any, lengths: Any, capacity: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    lists = (q.shape[0], sums.shape[1])
    return _int32(q, *lists, pages_of(capacity)), _int32(q, *lists)


def gather_rows(rows: Tensor, length: int, group: str) -> Tensor:
    return rows.new_empty(*rows.shape[:2], length, rows.shape[3])


def context_parallel_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return empty_result(q, v)


def padding_range(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    return _int32(key_mask, key_mask.shape[0]), _int32(key_mask, key_mask.shape[0])


def key_block_means(
    k: Tensor, start: Any, lengths: Any, key_mask: Any, blocks: Tensor | None = None, block: int = 1, k_len: int | None = None
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if k.dtype == torch.float64 else torch.float32
    batch = k.shape[0] if blocks is None else blocks.shape[0]
    k_len = length_of(k, KvView(blocks, block, None, None), k_len)
    shape = (batch, k.shape[1], key_block_count(k_len), k.shape[3])
    return k.new_empty(shape, dtype=exact), _int32(k, shape[0], shape[2])


def select_key_blocks(
    q: Tensor, means: Tensor, counts: Tensor, start: Any, lengths: Any, key_mask: Any, k_len: int, *rule: Any
) -> Tensor:
    share = rule[-2]  # then `lookahead`
    lists = q.shape[1] if share == "head" else means.shape[1]
    return q.new_empty(q.shape[0], lists, row_block_count(q.shape[2], k_len), word_count(k_len), dtype=torch.int64)


def role_key_blocks(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    k_len = rest[-1]
    return q.new_empty(*q.shape[:2], row_block_count(q.shape[2], k_len), word_count(k_len), dtype=torch.int64)


def key_block_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, k_len: int | None = None) -> tuple[Tensor, Tensor]:
    return empty_result(q, v), q.new_empty(q.shape[:3], dtype=torch.float32) if rest[-1] else no_lse(q)


def bridge_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_result(q, v), q.new_empty(q.shape[:3], dtype=torch.float32) if rest[-2] else no_lse(q)


def _int32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.int32)
