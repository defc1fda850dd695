"""Decode steps that read pages, in a real engine on the CPU: the index of pages is right whoever filled them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

import tsa_compile as tsa
from tests.vllm.engines import engine, prompts, tokens
from tsa_compile.frontends.vllm.counts import BY_LAYER
from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call

DENSE = {"prefill": {"policy": "Dense"}}


def plan(**budget):
    return {"phases": {**DENSE, "decode": tsa.PageSparse(**budget).to_dict()}}


def given():
    return prompts([97 + (i * 137) % 400 for i in range(16)], seed=1, shared=96)


def counted():
    rows = {counts.decode_rows for counts in BY_LAYER.values()}
    BY_LAYER.clear()
    assert len(rows) == 1
    return rows.pop()


@pytest.mark.slow
def test_every_page_gives_the_engines_own_tokens(model):
    with engine(model, custom=False) as llm:
        want = tokens(llm, given(), 40)
    BY_LAYER.clear()
    with engine(model, plan(keep=1.0), max_num_batched_tokens=256, max_model_len=1184, num_gpu_blocks_override=42) as llm:
        assert tokens(llm, given(), 40) == want
        assert counted() >= 16 * 37  # a few come from prompts that were thrown out and computed again


def by_transformers(model, policy, ids, new):
    """Greedy tokens, with the policy's own operators over keys in order, their sums made anew at every step."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module, q, k, v, mask, scaling=None, **options):
        if q.shape[2] > 1:
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **options)
        site = AttentionSite.of(Operands(q, k, v), MaskFacts(causal=True), scaling, phase="decode")
        return policy.attend(call, site, policy.select(call, site, None)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("pages-test", attend)
    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="pages-test", dtype=torch.float32)
    given = torch.tensor([ids])
    with torch.no_grad():
        out = loaded.generate(given, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, given.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("budget", [dict(keep=0.2), dict(mass=0.6)], ids=str)
def test_the_tokens_are_those_of_the_policy(model, budget):
    """Cached prefixes share their pages' sums: a second request with the same prompt gives the same tokens."""
    policy = tsa.PageSparse(**budget, sinks=1, recent=1)
    BY_LAYER.clear()
    with engine(model, {"phases": {**DENSE, "decode": policy.to_dict()}}) as llm:
        got = tokens(llm, given()[:4], 24)
        assert tokens(llm, given()[:4], 24) == got
        assert counted() == 2 * 4 * 23
    assert got == [by_transformers(model, policy, prompt["prompt_token_ids"], 24) for prompt in given()[:4]]
