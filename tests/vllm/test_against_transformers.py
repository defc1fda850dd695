"""Sparse tokens are those of transformers with `attn_implementation="tsa"` and the same policy, given the same chunks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

import tsa_compile as tsa
from tests.vllm.engines import engine, prompts, tokens

CHUNK = 512
POLICIES = [
    tsa.BlockSparse(alpha=0.3, last_dense=0, window=64),
    tsa.BlockSparse(alpha=0.3, share="group", pool=16),
    tsa.TokenSparse(coverage=0.3, min_tokens=100, window=16),
]


def by_transformers(model, policy, ids, new=12):
    """Greedy tokens: the prompt in chunks, then step by step."""
    from transformers import AutoModelForCausalLM, DynamicCache

    from tsa_compile.frontends import hf

    hf.register(tsa.Plan(prefill=policy), "tsa-vllm-test")
    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="tsa-vllm-test", dtype=torch.float32)
    cache, got = DynamicCache(), []
    with torch.no_grad():
        for start in range(0, len(ids), CHUNK):
            out = loaded(torch.tensor([ids[start : start + CHUNK]]), past_key_values=cache, use_cache=True)
        for _ in range(new):
            got.append(int(out.logits[0, -1].argmax()))
            out = loaded(torch.tensor([got[-1:]]), past_key_values=cache, use_cache=True)
    return got


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_the_same_chunks_give_the_same_tokens(model, policy):
    given = prompts([1300, 1024, 700, 100])
    with engine(model, {**policy.to_dict(), "min_context": 0}, max_num_batched_tokens=CHUNK, enable_prefix_caching=False) as llm:
        got = [tokens(llm, [prompt])[0] for prompt in given]
    assert got == [by_transformers(model, policy, prompt["prompt_token_ids"]) for prompt in given]
