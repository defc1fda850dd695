"""`generate()` in all its modes: the tokens with our cache layers are those of the untouched model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.cache.models import FAMILIES, cache_name, hooked, tiny, token_ids

transformers = pytest.importorskip("transformers")

LEFT = torch.cat([torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 33, dtype=torch.long)], 1)
LEFT[1, :7] = 1
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=20),
    "beams": dict(num_beams=3),
    "beam sampling": dict(num_beams=3, do_sample=True, top_k=20),
    "returned sequences": dict(do_sample=True, num_return_sequences=3, top_k=20),
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
    "chunked prefill": dict(prefill_chunk_size=13),
    "static": dict(cache_implementation="static", disable_compile=True),
}


def generate(model: Any, **more: Any) -> Any:
    transformers.set_seed(3)
    settings = {"max_new_tokens": 24, "do_sample": False, **more}
    with torch.no_grad():
        return model.generate(**settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_modes(family, mode):
    prompt = token_ids(20).repeat(1, 2) if mode == "prompt lookup" else token_ids(40, 2)
    want = generate(tiny(family), input_ids=prompt, **MODES[mode])
    model, seen = hooked(tiny(family))
    assert torch.equal(generate(model, input_ids=prompt, **MODES[mode]), want)
    if mode == "static":
        assert all(p.ours == () and "no DynamicCache" in p.reasons[-1] for p in seen)
    else:
        assert all(p.ours == (0, 1) and not p.reasons for p in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side(family):
    ids = token_ids(40, 2)
    for mask in (LEFT, LEFT.flip(1)):
        call = dict(input_ids=ids * mask, attention_mask=mask)
        model, seen = hooked(tiny(family))
        assert torch.equal(generate(model, **call), generate(tiny(family), **call))
        assert len(seen) == 24
        assert all(p.ours == (0, 1) for p in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted(family):
    """Both models have a cache of ours, and both are cropped."""
    prompt = token_ids(40)
    want = generate(tiny(family), input_ids=prompt, assistant_model=tiny(family, layers=1))
    (model, seen), (draft, drafted) = hooked(tiny(family)), hooked(tiny(family, layers=1))
    assert torch.equal(generate(model, input_ids=prompt, assistant_model=draft), want)
    assert all(p.ours == (0, 1) for p in seen)
    assert drafted
    assert all(p.ours == (0,) for p in drafted)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prefix_for_two_prompts(family):
    """The cache of a prefix is copied for each prompt, and then used on by the next turn."""
    prefix, prompts = token_ids(30), [torch.cat([token_ids(30), token_ids(9, seed=s)], 1) for s in (1, 2)]

    def answers(model):
        cache, found = transformers.DynamicCache(config=model.config), []
        name = cache_name(model)
        with torch.no_grad():
            model(prefix, **{name: cache})
        for prompt in prompts:
            mine = copy.deepcopy(cache)
            first = generate(model, input_ids=prompt, **{name: mine})
            found += [first, generate(model, input_ids=torch.cat([first, token_ids(5)], 1), **{name: mine})]
        return found

    model, seen = hooked(tiny(family))
    for got, want in zip(answers(model), answers(tiny(family)), strict=True):
        assert torch.equal(got, want)
    assert all(p.ours == (0, 1) for p in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_by_hand(family):
    """Chunks of any length; a cache made without a config makes its layers as they are called."""
    ids = token_ids(70, 2)

    def logits(model, cache):
        with torch.no_grad():
            return torch.cat([model(part, **{cache_name(model): cache}).logits for part in ids.split([30, 1, 20, 1, 18], 1)], 1)

    plain, (model, seen) = tiny(family), hooked(tiny(family))
    for make in (lambda: transformers.DynamicCache(config=plain.config), transformers.DynamicCache):
        torch.testing.assert_close(logits(model, make()), logits(plain, make()))
    assert all(p.ours == (0, 1) for p in seen[1:5])


def test_streamer_and_returned_cache():
    class Collect(transformers.generation.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    streams, results = (Collect(), Collect()), []
    for model, stream in zip((tiny("llama"), hooked(tiny("llama"))[0]), streams, strict=True):
        results.append(generate(model, input_ids=token_ids(20), streamer=stream, return_dict_in_generate=True))
    assert streams[0].tokens == streams[1].tokens
    plain, ours = ((r.cache if "cache" in r else r.past_key_values).layers[1] for r in results)
    torch.testing.assert_close(ours.keys, plain.keys)
    torch.testing.assert_close(ours.values, plain.values)


def test_gradients_leave_the_cache_alone():
    model, seen = hooked(tiny("llama"))
    model(
        token_ids(20), use_cache=True, **{cache_name(model): transformers.DynamicCache(config=model.config)}
    ).logits.sum().backward()
    assert seen[0].ours == ()
    assert "gradients" in seen[0].reasons[-1]


def test_a_cache_of_ours_under_autograd_becomes_plain():
    model, name = hooked(tiny("llama"))[0], cache_name(tiny("llama"))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(20), **{name: cache})
    loss = sum(model(token_ids(3, seed=s), **{name: cache}).logits.sum() for s in (1, 2))
    loss.backward()
    assert all(type(layer) is transformers.cache_utils.DynamicLayer for layer in cache.layers)
    assert cache.get_seq_length() == 26


def test_left_alone_with_a_reason():
    pytest.importorskip("transformers")
    from tsa_compile.cache.entry import prepare
    from tsa_compile.cache.storage import Pool

    config = tiny("llama").config
    filled = transformers.DynamicCache(config=config)
    filled.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
    offloaded = transformers.DynamicCache(config=config)
    offloaded.offloading = True
    with torch.no_grad():
        for cache, reason in (
            (filled, "not empty"),
            (offloaded, "offloaded to the host"),
            (transformers.StaticCache(config=config, max_cache_len=8), "StaticCache is no DynamicCache"),
            (None, "no transformers cache"),
        ):
            prepared = prepare((), {"past_key_values": cache}, Pool())
            assert prepared.ours == ()
            assert reason in prepared.reasons[-1]


def test_linear_layers_stay():
    """A hybrid model: its attention layers are ours, the others keep theirs."""
    config = transformers.LlamaConfig(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"])
    from tsa_compile.cache.entry import prepare
    from tsa_compile.cache.storage import Pool

    with torch.no_grad():
        prepared = prepare((), {"cache": transformers.DynamicCache(config=config)}, Pool())
    assert prepared.ours == (1,)
    assert set(prepared.reasons) == {0, 2}
    assert "LinearAttentionLayer" in prepared.reasons[0]
