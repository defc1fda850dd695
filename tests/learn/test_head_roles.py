"""Roles of heads: the score by its formula, a planted head first, and a plan that a model runs."""

from __future__ import annotations

import json

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.cache.models import cache_name
from tsa_compile.learn.head_roles import _chosen, head_roles, lookup_scores

SPAN, PLANTED = 8, (1, 2)  # layer, query head


@pytest.fixture(scope="module")
def model():
    """One head has large weights, alike for queries and keys, where rotation is slow, so that a repeated token finds itself."""
    torch.manual_seed(0)
    made = tiny_llama(num_hidden_layers=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e8})
    layer, head = PLANTED
    attention = made.model.layers[layer].self_attn
    with torch.no_grad():
        same = torch.zeros(16, 64)
        same[[5, 6, 7, 13, 14, 15]] = torch.randn(6, 64)
        attention.q_proj.weight[16 * head : 16 * (head + 1)] = same
        attention.k_proj.weight[16 * (head // 2) : 16 * (head // 2 + 1)] = same
        made.model.embed_tokens.weight.normal_()
    return made


@pytest.fixture(scope="module")
def texts():
    g = torch.Generator().manual_seed(1)
    return [torch.randperm(126, generator=g)[:n] + 1 for n in (120, 100)]  # no token twice


def test_the_score_is_the_attention_to_the_first_occurrence(model, texts):
    ids = texts[0][None]
    got = lookup_scores(model, ids, SPAN)
    first = 120 // 20
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        text = torch.cat([ids, ids[:, first : first + SPAN]], 1)
        attentions = model(input_ids=text, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    for layer, attention in enumerate(attentions):
        want = attention[0, :, -SPAN:, first : first + SPAN].sum(-1).mean(-1)
        torch.testing.assert_close(got[f"model.layers.{layer}.self_attn"], want, rtol=1e-4, atol=1e-5)


def test_the_planted_head_is_first_and_the_plan_runs(model, texts):
    plan = head_roles(model, texts, 0.1, span=SPAN, policy=tsa.HeadSplit((), window=30, sinks=2), progress=False)
    layer, head = PLANTED
    planted = plan.policy_at(f"model.layers.{layer}.self_attn", "decode")
    assert planted == tsa.HeadSplit((head,), window=30, sinks=2)
    assert plan.policy_at("model.layers.0.self_attn", "decode") == tsa.HeadSplit((), window=30, sinks=2)
    assert plan.notes["heads"] == "1 of 8 look things up"
    assert plan.notes["scores"][f"model.layers.{layer}.self_attn"][head] > 0.15
    assert tsa.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    torch._dynamo.reset()
    tsa.transform(model, plan)
    try:
        given = {cache_name(model): tsa.Cache(model, 1, 200)}
        with torch.no_grad():
            model(input_ids=texts[0][None, :-1], **given)
            model(input_ids=texts[0][None, -1:], **given)
        decode = [site for site in tsa.report(model).sites if site.policy == "HeadSplit"]
        assert [site.replaced for site in decode] == [True, True]
    finally:
        tsa.restore(model)


def test_shares_of_the_model_and_of_layers_and_thresholds():
    scores = {"a": torch.tensor([0.5, 0.1, 0.5]), "b": torch.tensor([0.2, 0.9, 0.0])}
    assert _chosen(scores, 0.5, None, False) == {"a": [0, 2], "b": [1]}
    assert _chosen(scores, 0.01, None, False) == {"a": [], "b": [1]}
    assert _chosen(scores, 0.34, None, True) == {"a": [0, 2], "b": [0, 1]}
    assert _chosen(scores, 1.0, 0.2, False) == {"a": [0, 2], "b": [0, 1]}


def test_what_is_wrong_is_named(model, texts):
    for change, message in (
        (dict(share=0), r"share must be in \(0, 1\]"),
        (dict(threshold=2), r"threshold in \[0, 1\]"),
        (dict(span=60), "prompt 0 has 120 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            head_roles(model, texts, **dict(span=SPAN, progress=False) | change)
