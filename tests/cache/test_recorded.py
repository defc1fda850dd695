"""Recorded decode steps: when one is replayed, and when not. On a CPU a replay is the same call again, under the same rules."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import nn

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import LEFT, generate
from tsa_compile import cuda_graphs
from tsa_compile.cuda_graphs import CudaReplay
from tsa_compile.session import attached
from tsa_compile.steps import FIXED, REPLAYED

transformers = pytest.importorskip("transformers")

PLAN = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), verify=tsa.Exact())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def models(request):
    """(untouched, transformed), its steps recorded also on a CPU."""
    torch._dynamo.reset()
    plain, ours = (tiny("llama", layers=1).to(request.param) for _ in range(2))
    tsa.transform(ours, PLAN)
    attached(ours).steps.recorded_on = frozenset({"cpu", "cuda"})
    return plain, ours


class Request:
    """A prompt and its cache: one token at a time, the logits beside those of the untouched model."""

    def __init__(self, models, seed=0):
        self.models, self.device = models, models[0].lm_head.weight.device
        self.caches = [transformers.DynamicCache(config=m.config) for m in models]
        self.ids, self.seen = token_ids(80, 2, seed).to(self.device), 0
        self.step(20)

    def step(self, n=1):
        """The next tokens; returns how the transformed model ran them, and checks what it gave."""
        ids = self.ids[:, self.seen : self.seen + n]
        positions = torch.arange(self.seen, self.seen + n, device=self.device)[None].expand(2, -1)
        before = dict(tsa.report(self.models[1]).steps)
        found = []
        with torch.no_grad():
            for model, cache in zip(self.models, self.caches, strict=True):
                found.append(model(ids, position_ids=positions, **{cache_name(model): cache}).logits)
        torch.testing.assert_close(*found)
        self.seen += n
        after = tsa.report(self.models[1]).steps
        return [how for how, count in after.items() for _ in range(count - before.get(how, 0))]


@pytest.mark.slow
def test_tokens_and_the_next_request(models):
    """Recorded once; the next request leases the same storage, and is replayed from its first step on."""
    ours = models[1]
    gc.collect()
    before = tsa.report(ours).steps.get(REPLAYED, 0)
    padded = dict(input_ids=(token_ids(40, 2) * LEFT).to(ours.device), attention_mask=LEFT.to(ours.device))
    for more in ({}, dict(do_sample=True, top_k=20)):
        assert torch.equal(*(generate(m, **padded, **more) for m in models))
        gc.collect()
    assert tsa.report(ours).steps[REPLAYED] == before + 2 * 23 - 1


def test_requests_in_turn(models):
    one, other = Request(models, 1), Request(models, 2)
    how = [x for _ in range(4) for r in (one, other) for x in r.step()]
    assert how[2:] == [REPLAYED] * 6


def test_steps_of_several_tokens(models):
    """Proposed tokens, to verify: a graph and a recording for each number of them."""
    request = Request(models)
    assert [request.step(3) for _ in range(3)] == [[FIXED], [REPLAYED], [REPLAYED]]
    with torch.no_grad():
        for cache in request.caches:
            cache.crop(-2)
    request.seen -= 2
    assert request.step(3) == [REPLAYED]
    sites = [s for s in tsa.report(models[1]).sites if s.q_len == "3"]
    assert sites
    assert all(s.replaced and s.policy == "Exact" for s in sites)


def test_logits_are_the_callers_own(models):
    request = Request(models)
    request.step()
    kept = []
    with torch.no_grad():
        for n in range(2):
            call = {"position_ids": torch.full((2, 1), 21 + n, device=request.device), cache_name(models[1]): request.caches[1]}
            kept.append(models[1](request.ids[:, 21 + n : 22 + n], **call).logits)
    assert kept[0].data_ptr() != kept[1].data_ptr()


def test_hooks_are_obeyed(models):
    request, seen = Request(models), []
    request.step()
    assert request.step() == [REPLAYED]
    hook = models[1].model.layers[0].mlp.register_forward_hook(lambda *a: seen.append(1))
    assert request.step() == [FIXED]
    assert seen
    hook.remove()
    assert request.step() == [REPLAYED]


def test_changed_weights_are_obeyed(models):
    request, heads = Request(models), [m.lm_head for m in models]
    request.step()
    assert request.step() == [REPLAYED]
    with torch.no_grad():
        for head in heads:
            head.weight *= 2  # in place
    assert request.step() == [REPLAYED]
    for head in heads:
        head.weight = nn.Parameter(head.weight.detach() * 0.5)
    assert request.step() == [FIXED]
    assert request.step() == [REPLAYED]


def test_a_buffer_that_moved_is_recorded_anew(models):
    request = Request(models)
    request.step()
    assert request.step() == [REPLAYED]
    with torch.no_grad():
        for cache in request.caches:
            cache.reorder_cache(torch.tensor([1, 0], device=request.device))
            cache.crop(-3)
    request.seen -= 3
    assert request.step() == [REPLAYED]
    for layer in request.caches[1].layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert request.step() == [REPLAYED]


def test_rows_behind_the_length_may_hold_anything(models):
    request = Request(models)
    request.step()
    layer = request.caches[1].layers[0]
    for buffer in layer.buffers[:2]:
        buffer[:, :, layer.length :] = float("nan")
    assert request.step() == [REPLAYED]


def test_what_a_replay_gives(monkeypatch):
    """A result like the recorded one, with copies of its tensors and the cache of the call."""

    class Graph:
        def replay(self):
            logits.add_(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    output, logits = transformers.modeling_outputs.CausalLMOutputWithPast, torch.zeros(1, 1, 5)
    first, second = transformers.DynamicCache(), transformers.DynamicCache()
    name = cache_name(tiny("llama", layers=1))
    replay = CudaReplay(lambda: output(logits=logits, hidden_states=(logits,), **{name: first}), first)
    one, two = replay(None, first), replay(None, second)
    assert type(two) is output
    assert (one[name], two[name]) == (first, second)
    assert [x.logits.max().item() for x in (one, two)] == [1, 2]
    assert two.hidden_states[0].max() == 2


@pytest.mark.slow
def test_a_site_that_stays_is_not_recorded():
    plan = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), rules=[("model.layers.0.*", "decode", tsa.Dense())])
    model = tsa.transform(tiny("llama"), plan)
    attached(model).steps.recorded_on = frozenset({"cpu"})
    generate(model, input_ids=token_ids(20), max_new_tokens=4)
    assert tsa.report(model).steps == {FIXED: 3}


@pytest.mark.gpu
@pytest.mark.parametrize("models", ["cuda"], indirect=True)
def test_nothing_waits_for_the_device(models):
    request = Request(models)
    request.step()
    request.step()
    call = {"position_ids": torch.full((2, 1), 22, device="cuda"), cache_name(models[1]): request.caches[1]}
    ids = request.ids[:, 22:23].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            models[1](ids, **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("models", ["cuda"], indirect=True)
def test_a_replay_after_other_work(models):
    """On the stream that it is called on, behind what was there."""
    request = Request(models)
    request.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    x = torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(stream):
        for _ in range(20):
            x = (x @ x).tanh()
        assert request.step() == [REPLAYED]
        assert request.step() == [REPLAYED]
    torch.cuda.current_stream().wait_stream(stream)


class RunsWhenRecorded(cuda_graphs.Again):
    """As a CUDA graph is made: by running the call once more."""

    def __init__(self, call, cache):
        call()


def test_a_step_that_is_recorded_is_one_run(monkeypatch):
    """A cache that keeps rows elsewhere asks, after each step, whether its policy took every attention of it."""
    monkeypatch.setattr(cuda_graphs, "Again", RunsWhenRecorded)
    torch._dynamo.reset()
    model = tsa.transform(tiny("llama", layers=1), tsa.Plan(prefill=tsa.Dense(), decode=tsa.Resident(keep=1.0, interval=8)))
    attached(model).steps.recorded_on = frozenset({"cpu"})
    out = model.generate(token_ids(40), max_new_tokens=7, do_sample=False)
    assert out.shape == (1, 47)
    assert tsa.report(model).steps[REPLAYED] > 1
