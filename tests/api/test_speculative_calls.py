"""Assisted and lookup decoding of a transformed model: the tokens are those without candidates."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids
from tsa_compile.first_call import parts
from tsa_compile.recorder import record_kept

SPARSE = tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8, completion=tsa.Completion(4, 2, 4))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def tokens(model, ids, **options):
    return model.generate(ids, max_new_tokens=12, do_sample=False, **options)


BLOCKS = tsa.BlockSparse(0.999, pool=32, window=1, sinks=0, last_dense=0)


@pytest.mark.parametrize(
    ("policy", "most"), [pytest.param(SPARSE, 0.9, marks=pytest.mark.slow), (BLOCKS, 0.98)], ids=["tokens", "blocks"]
)
def test_the_tokens_are_those_without_candidates(policy, most):
    model, draft, ids = tiny_llama(num_hidden_layers=2), tiny_llama(), token_ids(100).repeat(1, 3)
    tsa.transform(model, policy)
    expected = tokens(model, ids)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": draft}):
        with record_kept() as kept:
            actual = tokens(model, ids, **options)
        assert torch.equal(actual, expected)
        assert min(kept.shares()) < most  # the prefill is sparse


def test_padding_and_batches_go_with_their_rows():
    ids = token_ids(40, 2)
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[0, :7] = 0
    positions, image, cache = torch.arange(40).expand(3, 2, 40), torch.ones(1), object()
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "pixel_values": image, "cache": cache}
    first, second = parts({**given, "logits_to_keep": 4, "use_cache": True})
    assert (first["logits_to_keep"], second["logits_to_keep"]) == (1, 3)
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]], 1), ids)
    assert second["input_ids"].shape[1] == 3
    assert torch.equal(first["attention_mask"], mask[:, :42])
    assert torch.equal(second["attention_mask"], mask)
    assert torch.equal(second["position_ids"], positions[..., 37:])
    assert first["pixel_values"] is image
    assert "pixel_values" not in second
    assert first["cache"] is second["cache"] is cache


@pytest.mark.parametrize(
    "changes",
    [
        {"logits_to_keep": 1},
        {"logits_to_keep": 0},
        {"logits_to_keep": torch.tensor([1, 2])},
        {"logits_to_keep": 40},  # a verify step: every row is asked for
        {"cache": None},  # logits of a text, as evaluation asks for
        {"use_cache": False},
        {"attention_mask": torch.ones(1, 1, 40, 40)},
        {"output_attentions": True},
        {"return_dict": False},
        {"input_ids": None},
    ],
)
def test_other_calls_run_as_they_are(changes):
    given = {"input_ids": token_ids(40), "cache": object(), "logits_to_keep": 4, "use_cache": True}
    assert parts(given) is not None
    assert parts({**given, **changes}) is None


def test_hidden_states_are_joined():
    model, ids = tiny_llama(), token_ids(50)
    options = {"logits_to_keep": 5, "use_cache": True, "output_hidden_states": True}
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        expected = model(input_ids=ids, past_key_values=transformers.DynamicCache(), **options)
        tsa.transform(model, tsa.TokenSparse(coverage=0.0))
        actual = model(input_ids=ids, past_key_values=transformers.DynamicCache(), **options)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for a, b in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
