"""PageSparse over a cache of ours: the sums of pages are the cache's, brought up to date by each step, and rebuilt when stale."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tsa_compile.session import attached
from tsa_compile.steps import FIXED

transformers = pytest.importorskip("transformers")


@dataclasses.dataclass(frozen=True)
class Resummed(tsa.PageSparse):
    """The same, but the cache keeps nothing: each step sums all pages."""

    def states(self):
        return ()


def operators(model):
    """Names of our operators in the graph of the decode step."""
    session = attached(model)
    graph = session.backend.graphs[-1].form(session.plan).gm.graph
    return {n.target.name().removeprefix("tsa::") for n in graph.nodes if str(n.target).startswith("tsa.")}


@pytest.fixture(scope="module")
def models():
    torch._dynamo.reset()
    plans = [tsa.Plan(prefill=tsa.Dense(), decode=kind(keep=0.3, recent=1)) for kind in (tsa.PageSparse, Resummed)]
    return [tsa.transform(tiny("llama", layers=1), plan) for plan in plans]


def logits(model, cache, between=None, padding=37):
    """Of 25 tokens after a left-padded prompt of 150; `between` is called in the middle."""
    name, ids, found = cache_name(model), token_ids(175, 2), []
    mask = torch.ones(2, 175, dtype=torch.long)
    mask[0, :padding] = 0
    with torch.no_grad():
        for n in (150, *range(151, 176)):
            if n == 165 and between is not None:
                between(cache)
            first = 0 if n == 150 else n - 1
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, first:n]
            call = dict(attention_mask=mask[:, :n], position_ids=positions, **{name: cache})
            found.append(model(ids[:, first:n], **call).logits[:, -1])
    return torch.stack(found)


def test_the_sums_of_the_cache_are_those_of_its_keys(models):
    caches = [transformers.DynamicCache(config=m.config) for m in models]
    kept, resummed = (logits(m, c) for m, c in zip(models, caches, strict=True))
    torch.testing.assert_close(kept, resummed)
    dense = logits(tiny("llama", layers=1), transformers.DynamicCache())
    assert (kept - dense)[1:].abs().max() > 1e-4  # pages were left out
    assert operators(models[0]) == {"append_pages", "padding_range", "page_scores", "select_pages", "page_attention"}
    assert operators(models[1]) == {"page_sums", "padding_range", "page_scores", "select_pages", "page_attention"}
    assert tsa.report(models[0]).steps == {FIXED: 25}
    assert all(layer.states.rebuilt == 0 for layer in caches[0].layers)


def test_a_state_that_someone_else_made_stale_is_rebuilt(models):
    def write(cache):
        for layer in cache.layers:
            layer.buffers.keys[:, :, 48:64] += 1.0

    caches = [transformers.DynamicCache(config=m.config) for m in models]
    kept, resummed = (logits(m, c, write) for m, c in zip(models, caches, strict=True))
    torch.testing.assert_close(kept, resummed)
    assert (kept - logits(models[0], transformers.DynamicCache(config=models[0].config)))[15:].abs().max() > 1e-4
    assert all(layer.states.rebuilt == 1 for layer in caches[0].layers)


def test_a_cache_that_another_plan_filled_keeps_them_from_the_switch_on(models):
    found = []
    for model in models:
        session, cache = attached(model), transformers.DynamicCache(config=model.config)
        own, session.plan = session.plan, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact())
        assert not session.plan.decode.states()
        found.append(logits(model, cache, lambda cache, session=session, own=own: setattr(session, "plan", own)))
        assert session.plan is own
        found.append(cache.layers[0].states)
    torch.testing.assert_close(found[0], found[2])
    assert [x.name for x in found[1].kinds] == ["page_sums"]
    assert found[1].rebuilt == 1
    counted = found[1].tensors["page_sums"]["counts"]  # of full pages, by batch row; the first has 37 rows of padding
    assert counted.sum(-1).tolist() == [[160 - 37], [160]]


@pytest.mark.slow
def test_a_cache_with_room_from_the_start_keeps_them_too(models):
    model = models[0]
    cache = tsa.Cache(model, batch=2, max_length=1500)
    torch.testing.assert_close(logits(model, cache), logits(model, transformers.DynamicCache(config=model.config)))
    assert cache.layers[0].buffers.keys.shape[2] == 2048
    larger = tsa.Cache(model, batch=2, max_length=3000)
    torch.testing.assert_close(logits(model, larger), logits(model, cache.reset() or cache))
    assert cache.layers[0].state("page_sums") is not None
    first = cache.layers[0].buffers.keys.data_ptr()
    cache.reset()
    logits(model, cache)
    assert cache.layers[0].buffers.keys.data_ptr() == first


def test_after_crop_and_reorder(models):
    """The rows of another order and length, and their pages."""

    def change(cache):
        cache.reorder_cache(torch.tensor([0, 0]))
        cache.crop(-40)
        for layer in cache.layers:
            layer.update(*torch.randn(2, 2, 2, 40, 16, generator=torch.Generator().manual_seed(1)))

    kept, resummed = (logits(m, transformers.DynamicCache(config=m.config), change, padding=0) for m in models)
    torch.testing.assert_close(kept, resummed)


@pytest.mark.slow
def test_all_pages_are_the_dense_tokens():
    plain = tiny("llama", layers=1)
    ours = tsa.transform(tiny("llama", layers=1), tsa.Plan(prefill=tsa.Dense(), decode=tsa.PageSparse(1.0)))
    with torch.no_grad():
        found = [m.generate(token_ids(150), max_new_tokens=10, do_sample=False) for m in (plain, ours)]
    assert torch.equal(*found)
