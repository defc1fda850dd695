"""PageSparse by bases and with completion over a cache of ours: its state in the graph, through `generate()`, after changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import tiny, token_ids
from tests.cache.test_page_state import logits, operators
from tsa_compile.steps import FIXED

transformers = pytest.importorskip("transformers")
STEP = {"padding_range", "page_scores", "select_pages", "refine_scores", "page_attention", "complete_pages"}


@dataclasses.dataclass(frozen=True)
class Rebuilt(tsa.PageSparse):
    """The same, but the cache keeps nothing: each step makes all of it anew."""

    def states(self):
        return ()


@pytest.fixture(scope="module")
def models():
    torch._dynamo.reset()
    plans = [
        tsa.Plan(prefill=tsa.Dense(), decode=kind(0.5, "basis", True, recent=1, refine=0.6)) for kind in (tsa.PageSparse, Rebuilt)
    ]
    return [tsa.transform(tiny("llama", layers=1), plan) for plan in plans]


def test_what_the_cache_keeps_is_what_a_step_would_make(models):
    caches = [transformers.DynamicCache(config=m.config) for m in models]
    kept, rebuilt = (logits(m, c) for m, c in zip(models, caches, strict=True))
    torch.testing.assert_close(kept, rebuilt)
    dense = logits(tiny("llama", layers=1), transformers.DynamicCache())
    assert (kept - dense)[1:].abs().max() > 1e-4  # pages were left out
    assert operators(models[0]) == STEP | {"append_pages", "append_basis"}
    assert operators(models[1]) == STEP | {"page_sums", "page_basis"}
    assert tsa.report(models[0]).steps == {FIXED: 25}
    assert set(caches[0].layers[0].states.tensors) == {"page_sums", "page_bases", "value_sums"}


def test_after_crop_reorder_and_a_stale_write(models):
    def change(cache):
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-40)
        for layer in cache.layers:
            layer.update(*torch.randn(2, 2, 2, 40, 16, generator=torch.Generator().manual_seed(1)))
            layer.buffers.values[:, :, 48:64] += 1.0

    kept, rebuilt = (logits(m, transformers.DynamicCache(config=m.config), change, padding=0) for m in models)
    torch.testing.assert_close(kept, rebuilt)


@pytest.mark.slow
def test_generate_with_padding_and_sampling(models):
    """Two prompts, one of them padded on the left, sampled: the tokens do not depend on where the state comes from."""
    ids = token_ids(150, 2)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    found = []
    for model in models:
        torch.manual_seed(0)
        options = dict(attention_mask=mask, max_new_tokens=12, do_sample=True, pad_token_id=0)
        found.append(model.generate(ids, **options))
    assert torch.equal(*found)


@pytest.mark.slow
def test_all_pages_are_the_dense_tokens():
    plain = tiny("llama", layers=1)
    policy = tsa.PageSparse(1.0, "basis", completion=True)
    ours = tsa.transform(tiny("llama", layers=1), tsa.Plan(prefill=tsa.Dense(), decode=policy))
    with torch.no_grad():
        found = [m.generate(token_ids(150), max_new_tokens=10, do_sample=False) for m in (plain, ours)]
    assert torch.equal(*found)
