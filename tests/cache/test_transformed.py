"""`transform(model, Plan(decode=Exact()))`: `generate()` gives the untouched model's tokens in all modes, on our buffers."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import FAMILIES, cache_name, tiny, token_ids
from tests.cache.test_generate import LEFT, MODES, generate
from tsa_compile.session import attached
from tsa_compile.steps import FIXED

transformers = pytest.importorskip("transformers")

PLAN = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), verify=tsa.Exact())
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def models():
    """(untouched, transformed) of a family; one session for all modes, as a server has it."""
    torch._dynamo.reset()
    made: dict[str, Any] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in made:
            made[family] = tiny(family), tsa.transform(tiny(family), PLAN)
        return made[family]

    return get


def steps(model: Any) -> int:
    return tsa.report(model).steps.get(FIXED, 0)


def test_one_graph_serves_all_steps_and_requests(models):
    """No step compiles anything after the first; the storage goes back to the pool, and the next request leases it."""
    plain, ours = models("llama")
    session = attached(ours)
    padded = dict(input_ids=token_ids(40, 2) * LEFT, attention_mask=LEFT)
    assert torch.equal(*(generate(m, **padded, max_new_tokens=102) for m in (plain, ours)))
    assert tsa.report(ours).graphs == 2  # the prompt's, and one for 101 steps
    assert steps(ours) == 101
    gc.collect()
    (storage,) = session.steps.pool._free
    assert torch.equal(*(generate(m, **padded, do_sample=True, top_k=20) for m in (plain, ours)))
    assert tsa.report(ours).graphs == 2
    gc.collect()
    assert session.steps.pool._free == [storage]


def test_rows_behind_the_new_one_are_masked(models):
    """transformers leaves out the mask of one query without padding, unless the cache is a static one: so ours is, in a step."""
    plain, ours = models("llama")
    told = dict(input_ids=token_ids(40), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    cache, seen = transformers.DynamicCache(config=ours.config), []
    step = attached(ours).steps._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attached(ours).steps, "_step", lambda *args: seen.append(cache.is_compileable) or step(*args))
        got = ours.generate(**told, past_key_values=cache)
    assert seen == [True] * 3
    assert not cache.is_compileable
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(plain.generate(**told).logits), rtol=1e-4, atol=1e-5)


@slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [m for m in MODES if m != "static"])
def test_modes(models, family, mode):
    plain, ours = models(family)
    prompt = token_ids(20).repeat(1, 2) if mode == "prompt lookup" else token_ids(40, 3)
    before = steps(ours)
    assert torch.equal(generate(ours, input_ids=prompt, **MODES[mode]), generate(plain, input_ids=prompt, **MODES[mode]))
    if family in ("llama", "gemma3"):
        assert steps(ours) >= before + (4 if mode == "prompt lookup" else 23)
    assert not tsa.report(ours).untraced


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side(models, family):
    plain, ours = models(family)
    ids = token_ids(40, 2)
    for mask in (LEFT, LEFT.flip(1)):
        call = dict(input_ids=ids * mask, attention_mask=mask)
        assert torch.equal(generate(ours, **call), generate(plain, **call))


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted(models, family):
    plain, ours = models(family)
    prompt = token_ids(40)
    want = generate(plain, input_ids=prompt, assistant_model=tiny(family, layers=1))
    draft = tsa.transform(tiny(family, layers=1), PLAN)
    assert torch.equal(generate(ours, input_ids=prompt, assistant_model=draft), want)


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_prefix_for_two_prompts(models, family):
    """The cache of a prefix is copied for each prompt, and then used on by the next turn."""
    prefix, prompts = token_ids(30), [torch.cat([token_ids(30), token_ids(9, seed=s)], 1) for s in (1, 2)]

    def answers(model):
        cache, found, name = transformers.DynamicCache(config=model.config), [], cache_name(model)
        with torch.no_grad():
            model(prefix, **{name: cache})
        for prompt in prompts:
            mine = copy.deepcopy(cache)
            first = generate(model, input_ids=prompt, **{name: mine})
            found += [first, generate(model, input_ids=torch.cat([first, token_ids(5)], 1), **{name: mine})]
        return found

    for want, got in zip(*map(answers, models(family)), strict=True):
        assert torch.equal(got, want)


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_by_hand(models, family):
    """Chunks and single tokens in turn, without a mask; a cache made without a config makes its layers as they are called."""
    ids = token_ids(70, 2)

    def logits(model, cache):
        parts = ids.split([30, 1, 1, 20, 1, 17], 1)
        with torch.no_grad():
            return torch.cat([model(part, **{cache_name(model): cache}).logits for part in parts], 1)

    plain, ours = models(family)
    for make in (lambda: transformers.DynamicCache(config=plain.config), transformers.DynamicCache):
        torch.testing.assert_close(logits(ours, make()), logits(plain, make()))


@slow
def test_streamer_and_returned_cache(models):
    class Collect(transformers.generation.BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    streams, results = (Collect(), Collect()), []
    for model, stream in zip(models("llama"), streams, strict=True):
        results.append(generate(model, input_ids=token_ids(20), streamer=stream, return_dict_in_generate=True))
    assert streams[0].tokens == streams[1].tokens
    plain, ours = ((r.cache if "cache" in r else r.past_key_values).layers[1] for r in results)
    torch.testing.assert_close(ours.keys, plain.keys)
    torch.testing.assert_close(ours.values, plain.values)


@slow
def test_buffers_grow_within_a_request():
    """Beyond a storage's capacity the next one is leased: one more graph, for all capacities to come."""
    plain, ours = tiny("llama"), tsa.transform(tiny("llama"), PLAN)
    for model in (plain, ours):
        model.config.max_position_embeddings = 4096
    ids = token_ids(1020)
    assert torch.equal(*(generate(m, input_ids=ids, max_new_tokens=10) for m in (plain, ours)))
    assert tsa.report(ours).graphs == 3


@slow
def test_what_is_left_alone_is_said(models, caplog):
    plain, ours = models("llama")
    caches = {
        "StaticCache is no DynamicCache": lambda: transformers.StaticCache(config=ours.config, max_cache_len=64),
        "not empty": lambda: filled(plain),
    }
    for reason, make in caches.items():
        found = []
        for model in (plain, ours):
            torch.manual_seed(0)
            cache, name = make(), cache_name(model)
            with torch.no_grad():
                found += [torch.cat([model(x, **{name: cache}).logits for x in token_ids(12).split([9, 1, 1, 1], 1)], 1)]
        torch.testing.assert_close(*found)
        assert any(reason in w for w in tsa.report(ours).warnings), reason
        assert any(reason in how for how in tsa.report(ours).steps), reason


def filled(model: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(5), **{cache_name(model): cache})
    return cache
