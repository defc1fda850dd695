"""A random language model with a tokenizer of single bytes: every evaluation runs on it in seconds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.tiny import tiny_llama

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat: bool) -> Any:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<pad>": 0, "<bos>": 1}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", pad_token="<pad>")
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def tiny_lm(layers: int = 4) -> Any:
    """4/2 heads of 8, 258 token ids, 4096 positions."""
    return tiny_llama(vocab_size=258, hidden_size=32, num_hidden_layers=layers, max_position_embeddings=4096)
