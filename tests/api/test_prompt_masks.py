"""`generate()` over a static cache, whose masks transformers makes before the call: prompts with padding are sparse, too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, tiny_llama, token_ids


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def generated(model):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :11] = 0
    torch.manual_seed(0)
    call = dict(input_ids=token_ids(60, 2) * mask, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return model.generate(**call, cache_implementation="static")


def test_left_padding_over_a_static_cache():
    model = tiny_llama()
    expected = generated(model)
    tsa.transform(model, KEEP_ALL)
    assert torch.equal(generated(model), expected)
    report = tsa.report(model)
    assert [site.replaced for site in report.sites] == [True], report
    tsa.restore(model)
    assert "create_masks_for_generate" not in vars(model)


def test_masks_are_the_models_own_but_for_prompts():
    """So are those of a copy, and of a model that the user gave a function."""
    model, made = tiny_llama(), []
    own = lambda **kwargs: made.append(kwargs) or "mask"  # noqa: E731
    model.create_masks_for_generate = own
    tsa.transform(model)
    assert model.create_masks_for_generate is own
    tsa.restore(model)
    assert model.create_masks_for_generate is own
    del model.create_masks_for_generate
    type(model).create_masks_for_generate = staticmethod(own)
    try:
        tsa.transform(model)
        for same in (model, copy.deepcopy(model)):
            make = same.create_masks_for_generate
            padding = torch.ones(1, 9)
            assert make(inputs_embeds=torch.empty(1, 9, 0), attention_mask=padding) is padding
            assert make(inputs_embeds=torch.empty(1, 1, 0), attention_mask=padding) == "mask"
            assert make(inputs_embeds=torch.empty(1, 9, 0), attention_mask=torch.ones(1, 1, 9, 9)) == "mask"
    finally:
        del type(model).create_masks_for_generate
    assert len(made) == 4


def test_a_pickle_is_dense_and_generates():
    model = tsa.transform(tiny_llama(), KEEP_ALL)
    assert generated(pickle.loads(pickle.dumps(model))).shape == (2, 64)
