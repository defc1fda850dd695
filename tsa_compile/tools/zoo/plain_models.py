"""Entries in plain PyTorch: nanoGPT-style code, `nn.MultiheadAttention`, `nn.TransformerEncoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsa_compile.tools.zoo.entries import LENGTH, NO_FAST_PATH, TINY, Entry, ids, sharpen

WIDTH, HEADS = 64, 4


class CausalSelfAttention(nn.Module):
    """Self-attention as small GPTs write it: SDPA, or a causal mask that is computed or lies in a buffer."""

    bias: Tensor

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        if self.implementation == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
            y = F.softmax(scores.masked_fill(self._hidden(t), float("-inf")), dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))

    def _hidden(self, t: int) -> Tensor:
        computed = self.implementation == "computed mask"
        return torch.ones(t, t, dtype=torch.bool).triu(1) if computed else self.bias[:, :, :t, :t] == 0


class Gpt(nn.Module):
    """Two blocks of pre-norm self-attention and MLP between an embedding and a head."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TINY["vocab_size"], WIDTH), nn.Embedding(256, WIDTH)
        self.attention = nn.ModuleList(CausalSelfAttention(implementation) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.head = nn.Linear(WIDTH, TINY["vocab_size"])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for n, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * n](x))
            x = x + mlp(self.norms[2 * n + 1](x))
        return self.head(self.norms[4](x))


class SeparateHeads(nn.Module):
    """Two layers with a module for each head, as lectures write them: no tensor has a dimension of heads."""

    tril: Tensor

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.sdpa = implementation == "sdpa"
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH // 2) for _ in range(2)) for _ in range(2))
        self.register_buffer("tril", torch.ones(256, 256).tril())

    def forward(self, x: Tensor) -> Tensor:
        for heads in self.layers:
            x = x + torch.cat([self._head(*qkv(x).chunk(3, -1)) for qkv in heads.children()], -1)
        return x

    def _head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, scale = q.shape[1], q.shape[2] ** -0.5
        if self.sdpa:
            return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        weights = q @ k.transpose(-2, -1) * scale
        return weights.masked_fill(self.tril[:t, :t] == 0, float("-inf")).softmax(-1) @ v


class MultiheadAttention(nn.Module):
    """Two layers of `nn.MultiheadAttention` with a causal mask: computed, or in a buffer as in CLIP's text encoder."""

    mask: Tensor | None

    def __init__(self, buffer: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        mask = nn.Transformer.generate_square_subsequent_mask(256) if buffer else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, buffer = x.shape[1], self.mask
        mask = nn.Transformer.generate_square_subsequent_mask(n) if buffer is None else buffer[:n, :n]
        for layer in self.layers:
            x = x + layer(x, x, x, attn_mask=mask, is_causal=buffer is None, need_weights=False)[0]
        return x


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, bidirectional or with a causal mask."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True)
        self.causal, self.encoder = causal, nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.causal:
            return self.encoder(x)
        return self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]), is_causal=True)


def _vectors() -> dict[str, Any]:
    return {"x": torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))}


def _gpt(name: str, implementations: tuple[str, ...], sites: int) -> Entry:
    return Entry(name, "torch", lambda i: sharpen(Gpt(i)), sites, ids, "plain", implementations)


def _module(name: str, build: Callable[[], nn.Module], implementation: str, sites: int) -> Entry:
    return Entry(name, "torch", lambda i: sharpen(build()), sites, _vectors, "call", (implementation,))


PLAIN: tuple[Entry, ...] = (
    _gpt("nanoGPT-style", ("sdpa", "computed mask", "mask in a buffer"), 2),
    Entry("a module for each head", "torch", lambda i: sharpen(SeparateHeads(i)), 4, _vectors, "call", ("sdpa", "written out")),
    _module("nn.MultiheadAttention (causal)", MultiheadAttention, NO_FAST_PATH, 2),
    _module("nn.MultiheadAttention (mask in a buffer)", lambda: MultiheadAttention(buffer=True), NO_FAST_PATH, 2),
    _module("nn.TransformerEncoder", lambda: Encoder(causal=False), NO_FAST_PATH, 0),
    _module("nn.TransformerEncoder (causal)", lambda: Encoder(causal=True), NO_FAST_PATH, 2),
    _module("nn.TransformerEncoder (causal, fused)", lambda: Encoder(causal=True), "fast path", 0),
)
