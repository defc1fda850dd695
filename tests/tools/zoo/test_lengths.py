"""One compile serves ten prompt lengths, also of padded batches and with caches."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, tiny_llama, token_ids
from tsa_compile.tools.zoo.all_entries import ENTRIES

LENGTHS = range(40, 140, 10)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def plain(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def padded(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def cached(model, ids):
    from transformers import DynamicCache

    return model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits


@pytest.mark.parametrize("call", [padded, cached])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ten_lengths_take_one_graph(call, implementation):
    model = tiny_llama(attn_implementation=implementation)
    inputs = [token_ids(length, batch=2) for length in LENGTHS]
    with torch.no_grad():
        dense = [call(model, ids) for ids in inputs]
        tsa.transform(model, KEEP_ALL)
        kept = [call(model, ids) for ids in inputs]
    report = tsa.report(model)
    assert report.graphs == 1
    assert [s.replaced for s in report.sites] == [True]
    for a, b in zip(kept, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_models_with_other_scales_stay_apart():
    """Dynamo remembers by place in the source which numbers changed, and would make the second model's scale an input."""
    for heads in (4, 2):
        model = tiny_llama(num_attention_heads=heads, num_key_value_heads=2)
        tsa.transform(model, KEEP_ALL)
        with torch.no_grad():
            plain(model, token_ids(40))
        report = tsa.report(model)
        assert len(report.replaced) == 1, report
        assert {s.q_len for s in report.sites} == {"any"}


@pytest.mark.parametrize("family", ["GPT-2", "DeepSeek-V3", "Gemma 3"])
def test_other_families_too(family):
    pytest.importorskip("transformers")
    entry = next(e for e in ENTRIES if e.name == family)
    model = entry.build("sdpa")
    tsa.transform(model, KEEP_ALL)
    with torch.no_grad():
        for length in LENGTHS:
            plain(model, token_ids(length) % 90)
    report = tsa.report(model)
    assert report.graphs == 1
    assert len(report.replaced) == entry.causal
