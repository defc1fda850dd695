"""Small random models with real code, for tests of the interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa

SPARSE = tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8, min_queries=0, completion=tsa.Completion(4, 2, 4))
KEEP_ALL = tsa.TokenSparse.paper(coverage=0.0, window=1, pool=1, min_tokens=1, min_queries=0)


def tiny_llama(**overrides: Any) -> Any:
    """A random Llama: 1 layer (each doubles what a trace costs), 4/2 heads of 16, 128 token ids."""
    transformers = pytest.importorskip("transformers")
    config = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **overrides})).eval()


def token_ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length))


class Layers(torch.nn.Module):
    """Two causal attentions with residuals, over embeddings; quick to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(128, 32)
        self.layers = torch.nn.ModuleList(Attention() for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
