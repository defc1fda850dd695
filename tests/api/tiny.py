"""Small random models with real code, for tests of the interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tsa_compile as tsa

SPARSE = tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8, min_queries=0, completion=tsa.Completion(4, 2, 4))
KEEP_ALL = tsa.TokenSparse.paper(coverage=0.0, window=1, pool=1, min_tokens=1, min_queries=0)
LAYERS = 2


def tiny_llama(**overrides: Any) -> Any:
    """A random Llama: 2 layers, 4/2 heads of 16, 128 token ids."""
    transformers = pytest.importorskip("transformers")
    config = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **overrides})).eval()


def token_ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length))
