"""What operators return, uninitialised: the shapes, dtypes and strides of docs/operators.md, for tracing."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


def empty_result(q: Tensor, v: Tensor) -> Tensor:
    """`[B, H, Lq, Dv]`, stored as `[B, Lq, H, Dv]`."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """The result of every attention."""
    return empty_result(q, v)


def select_tokens(q: Tensor, k: Tensor, *rest: Any, share: str = "head") -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads), (kv_heads, k_len), heavy = q.shape[:2], k.shape[1:3], rest[-1]
    lists = heads if share == "head" else kv_heads
    return _int32(q, batch, lists, k_len), _int32(q, batch), _int32(q, batch, lists, heavy)


def select_keys(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _int32(q, q.shape[0], q.shape[1], k.shape[2]), _int32(q, q.shape[0])


def select_blocks(q: Tensor, k: Tensor, indices: Tensor, counts: Tensor, scale: float, block: int, *rest: Any) -> Any:
    (batch, heads), n = q.shape[:2], -(-k.shape[2] // block)
    return q.new_empty(batch, heads, n, n, dtype=torch.int16), _int32(q, batch, heads, n)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block: int, *rest: Any, scores: bool = False, **masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    scores = rest[9] if len(rest) > 9 else scores
    (batch, heads), capacity = q.shape[:2], k.shape[2] if blocks is None else blocks.shape[1] * block
    return *page_attention(q, k, v), q.new_empty(batch, heads, 2 if scores else 0, capacity, dtype=torch.float32)


def page_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **masks: Any) -> tuple[Tensor, Tensor]:
    return empty_result(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _int32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.int32)
