"""A tiny model whose tokens attend to tokens of their own topic, and texts that go from topic to topic."""

from __future__ import annotations

from typing import Any

import torch

from tests.api.tiny import tiny_llama

TOPICS, WORDS = 4, 30


def topic_model(seed: int = 0) -> Any:
    """A Llama of 2 layers, 4/2 heads of 16: queries and keys by the same projection, and like embeddings for a topic's words."""
    torch.manual_seed(seed)
    model = tiny_llama(num_hidden_layers=2, head_dim=16, max_position_embeddings=2048)
    with torch.no_grad():
        topic = torch.randn(TOPICS, 64)
        words = model.model.embed_tokens.weight
        words.copy_(0.3 * torch.randn(words.shape))
        words[1 : 1 + TOPICS * WORDS] += topic.repeat_interleave(WORDS, 0)
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(torch.randn(32, 64) * 0.2)
            attention.q_proj.weight.copy_(attention.k_proj.weight.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1))
    return model


def topic_text(length: int, seed: int) -> torch.Tensor:
    """int64 `[length]`: stretches of 40 to 90 words of one topic."""
    g = torch.Generator().manual_seed(seed)
    parts: list[torch.Tensor] = []
    while sum(map(len, parts)) < length:
        topic, words = (int(torch.randint(0, n, (1,), generator=g)) for n in (TOPICS, 50))
        parts.append(torch.randint(1 + topic * WORDS, 1 + topic * WORDS + WORDS, (40 + words,), generator=g))
    return torch.cat(parts)[:length]
