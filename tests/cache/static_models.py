"""Attention layers with a static cache of their own, written as in three well-known code bases."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BATCH, HEADS, KV_HEADS, DIM, ROWS = 2, 4, 2, 8, 32


class Projections(nn.Module):
    """Queries `[B, H, n, D]`, keys and values `[B, Hk, n, D]` of `x` `[B, n, H * D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.wk = nn.Linear(HEADS * DIM, KV_HEADS * DIM)
        self.wv = nn.Linear(HEADS * DIM, KV_HEADS * DIM)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [w(x).unflatten(-1, (-1, DIM)) for w in (self.wq, self.wk, self.wv)]


class GptFast(Projections):
    """`k_cache[:, :, input_pos] = k`, heads repeated after it, the mask's rows by `input_pos` (gpt-fast, model.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(BATCH, KV_HEADS, ROWS, DIM))
        self.register_buffer("v_cache", torch.zeros(BATCH, KV_HEADS, ROWS, DIM))
        self.register_buffer("causal_mask", torch.ones(ROWS, ROWS, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        k = k_out.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v_out.repeat_interleave(HEADS // KV_HEADS, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.causal_mask[None, None, input_pos])


class TorchTune(Projections):
    """The cache counts its own positions and moves them on (torchtune, modules/kv_cache.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(BATCH, KV_HEADS, ROWS, DIM))
        self.register_buffer("v_cache", torch.zeros(BATCH, KV_HEADS, ROWS, DIM))
        self.register_buffer("cache_pos", torch.arange(ROWS))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, self.cache_pos[: x.shape[1]]] = k
        v_out[:, :, self.cache_pos[: x.shape[1]]] = v
        self.cache_pos.add_(x.shape[1])
        shape = (BATCH, KV_HEADS, HEADS // KV_HEADS, ROWS, DIM)
        k, v = (t.unsqueeze(2).expand(shape).flatten(1, 2) for t in (k_out, v_out))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class IndexCopy(Projections):
    """`index_copy_` at `arange(n) + length` (transformers, StaticLayer)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(BATCH, KV_HEADS, ROWS, DIM))
        self.register_buffer("v_cache", torch.zeros(BATCH, KV_HEADS, ROWS, DIM))
        self.register_buffer("length", torch.tensor(0))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.split(x))
        position = torch.arange(x.shape[1]) + self.length
        self.length.add_(x.shape[1])
        self.k_cache.index_copy_(2, position, k)
        self.v_cache.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask, enable_gqa=True)


class Slices(Projections):
    """Slices of a buffer `[batch, rows, heads, D]`, written and read up to the last row (Llama's own code)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(BATCH + 1, ROWS, KV_HEADS, DIM))
        self.register_buffer("v_cache", torch.zeros(BATCH + 1, ROWS, KV_HEADS, DIM))

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        q, k, v = self.split(x)
        batch, end = x.shape[0], start + x.shape[1]
        self.k_cache[:batch, start:end] = k
        self.v_cache[:batch, start:end] = v
        k, v = self.k_cache[:batch, :end], self.v_cache[:batch, :end]
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)


def inputs(model: nn.Module, rows: int, start: int = 0) -> tuple[Any, ...]:
    """Arguments for `rows` new rows behind `start` old ones."""
    x = torch.randn(BATCH, rows, HEADS * DIM)
    if isinstance(model, GptFast):
        return x, torch.arange(start, start + rows)
    if isinstance(model, Slices):
        return x, start
    return x, torch.ones(ROWS, ROWS, dtype=torch.bool).tril()[start : start + rows]
