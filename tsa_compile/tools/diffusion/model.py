"""A small block-diffusion language model: to train within minutes, or in a test within seconds; and what its training step is."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensor = torch.Tensor
# cuDNN's backward with a mask gives gradients that are not numbers at lengths of 64 beyond multiples of 128 (pytorch#196678)
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a `BlockLM`. The last token id is [MASK]."""

    vocabulary: int
    block: int
    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 512
    rope_base: float = 10_000.0

    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1


class BlockLM(nn.Module):
    """Llama's layers, whose attention is handed in: see `generate.diffusion.BlockModel`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes, n) for n in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=sizes.width**-0.5)

    def forward(self, ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """Token ids `[B, n]` at `positions` `[n]` -> logits `[B, n, vocabulary]`."""
        dim = self.sizes.width // self.sizes.heads
        rates = self.sizes.rope_base ** (-torch.arange(0, dim, 2, device=ids.device) / dim)
        angles = (positions[:, None] * rates).repeat(1, 2)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), attend)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and beside a residual."""

    def __init__(self, sizes: Sizes, number: int) -> None:
        super().__init__()
        self.number, self.heads, self.kv_heads = number, sizes.heads, sizes.kv_heads
        dim = sizes.width // sizes.heads
        self.before_attention, self.before_mlp = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.q = nn.Linear(sizes.width, sizes.heads * dim, bias=False)
        self.k, self.v = (nn.Linear(sizes.width, sizes.kv_heads * dim, bias=False) for _ in range(2))
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.gate, self.up = (nn.Linear(sizes.width, sizes.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.mlp, sizes.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        y = self.before_attention(x)
        q, k, v = (
            f(y).unflatten(-1, (n, -1)).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        y = attend(self.number, _rotated(q, cos, sin), _rotated(k, cos, sin), v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)  # angles are float32


def training_mask(length: int, block: int, first: int = 0) -> Tensor:
    """Which rows of noisy and clean tokens together see which: bool `[n, n]`, the noisy ones first, from position `first` on.

    A noisy block sees itself and the clean blocks before it, a clean one the clean ones up to itself (BD3-LM, arXiv 2503.09573).
    """
    of = torch.arange(length) // block
    same, earlier = of[:, None] == of, of[:, None] > of
    noisy = torch.cat([same[:, first:], earlier], 1)[first:]
    return torch.cat([noisy, torch.cat([torch.zeros_like(same)[:, first:], same | earlier], 1)])


class Losses(NamedTuple):
    """Mean cross entropy at the masked tokens of the last block, and at those of the other blocks; 0 where there are none."""

    answers: Tensor
    prose: Tensor


def training_loss(model: BlockLM, ids: Tensor, noise: Tensor, mask: Tensor, first: int = 0) -> Losses:
    """One call over noisy and clean tokens.

    Args:
        ids: clean tokens `[B, L]`, whole blocks.
        noise: bool `[B, L - first]`, true where [MASK] takes a token's place.
        mask: `training_mask(L, block, first)`, on the device of `ids`.
        first: where the first block begins that is learned.
    """
    learned, at = ids[:, first:], torch.arange(ids.shape[1], device=ids.device)
    noisy = torch.where(noise, model.sizes.mask_id, learned)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # with a mask no fused kernel takes groups
        with sdpa_kernel(WITHOUT_CUDNN):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    logits = model(torch.cat([noisy, ids], 1), torch.cat([at[first:], at]), attend)[:, : noisy.shape[1]]
    last = torch.arange(noise.shape[1], device=ids.device) >= noise.shape[1] - model.sizes.block
    mean = lambda part: F.cross_entropy(logits[part].float(), learned[part], reduction="sum") / part.sum().clamp(min=1)  # noqa: E731
    return Losses(mean(noise & last), mean(noise & ~last))
