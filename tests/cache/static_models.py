"""Small decoders with a static cache of their own, written as in four well-known code bases."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

BATCH, HEADS, KV_HEADS, DIM, ROWS, VOCABULARY = 2, 4, 2, 8, 80, 50


class OwnCache(nn.Module):
    """An attention that keeps its keys and values in buffers. `forward(x [B, n, H * D], mask, input_pos [n])`."""

    shape: tuple[int, ...] = (BATCH, KV_HEADS, ROWS, DIM)

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.wk = nn.Linear(HEADS * DIM, KV_HEADS * DIM)
        self.wv = nn.Linear(HEADS * DIM, KV_HEADS * DIM)
        self.register_buffer("k_cache", torch.zeros(self.shape))
        self.register_buffer("v_cache", torch.zeros(self.shape))

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries `[B, H, n, D]`, keys and values `[B, Hk, n, D]`."""
        return [w(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)]


class GptFast(OwnCache):
    """`k_cache[:, :, input_pos] = k`, heads repeated after it, the mask's rows by `input_pos` (gpt-fast, model.py)."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        k = k_out.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v_out.repeat_interleave(HEADS // KV_HEADS, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)


class TorchTune(OwnCache):
    """The cache counts its own positions and moves them on (torchtune, modules/kv_cache.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache_pos", torch.arange(ROWS))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        if not torch.compiler.is_exporting():  # it depends on data
            assert (self.cache_pos[0] + x.shape[1]) <= self.k_cache.shape[2]
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, self.cache_pos[: x.shape[1]]] = k
        v_out[:, :, self.cache_pos[: x.shape[1]]] = v
        self.cache_pos.add_(x.shape[1])
        shape = (BATCH, KV_HEADS, HEADS // KV_HEADS, -1, DIM)
        k, v = (t.unsqueeze(2).expand(shape).flatten(1, 2) for t in (k_out, v_out))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class IndexCopy(OwnCache):
    """`index_copy_` at `arange(n) + length` (transformers, StaticLayer)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("length", torch.tensor(0))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        position = torch.arange(x.shape[1]) + self.length
        self.length.add_(x.shape[1])
        self.k_cache.index_copy_(2, position, k)
        self.v_cache.index_copy_(2, position, v)
        return F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask, enable_gqa=True)


class Slices(OwnCache):
    """Slices of a buffer `[batch, rows, heads, D]`, written and read up to the last row (Llama's own code)."""

    shape = (BATCH + 1, ROWS, KV_HEADS, DIM)

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        q, k, v = self.heads(x)
        batch, end = x.shape[0], start + x.shape[1]
        self.k_cache[:batch, start:end] = k.transpose(1, 2)
        self.v_cache[:batch, start:end] = v.transpose(1, 2)
        k, v = self.k_cache[:batch, :end], self.v_cache[:batch, :end]
        return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)


class Decoder(nn.Module):
    """A language model of two such attentions; its mask is rows of a buffer, or an argument."""

    def __init__(self, attention: type[OwnCache]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, HEADS * DIM), nn.Embedding(ROWS, HEADS * DIM)
        self.layers = nn.ModuleList(attention() for _ in range(2))
        self.output = nn.Linear(HEADS * DIM, VOCABULARY)
        self.causal_mask = torch.tril(torch.ones(ROWS, ROWS, dtype=torch.bool))

    def forward(self, idx: torch.Tensor, input_pos: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = self.causal_mask[None, None, input_pos] if mask is None else mask[:, None]
        x = self.tokens(idx) + self.positions(input_pos % ROWS)
        for layer in self.layers:
            x = x + layer(x, mask, input_pos).transpose(1, 2).flatten(2)
        return self.output(x)


def decoder(attention: type[OwnCache]) -> Decoder:
    torch.manual_seed(0)
    return Decoder(attention).eval()


def continued(model: Decoder, idx: torch.Tensor, steps: int, padding: tuple[int, ...] | None = None) -> torch.Tensor:
    """The prompt in one call, then `steps` greedy ones: tokens `[B, steps + 1]`.

    `padding`: how many first tokens of each row are; the mask is then an argument, as torchtune has it.
    """
    with torch.no_grad():
        for buffer in ("cache_pos", "length"):
            for layer in model.layers:
                if hasattr(layer, buffer):
                    getattr(layer, buffer).sub_(getattr(layer, buffer).reshape(-1)[0].clone())
    visible = model.causal_mask.expand(BATCH, -1, -1)
    if padding is not None:
        visible = visible & (torch.arange(ROWS) >= torch.tensor(padding)[:, None])[:, None]
    position, found = torch.arange(idx.shape[1]), []
    for _ in range(steps + 1):
        with torch.no_grad():
            logits = model(idx, position) if padding is None else model(idx, position, mask=visible[:, position])
        idx, position = logits[:, -1:].argmax(-1), position[-1:] + 1
        found.append(idx)
    return torch.cat(found, 1)
