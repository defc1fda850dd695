"""All draft steps of a round as one call: the same tokens as step by step, one recording, one read of the device a round."""

from __future__ import annotations

import gc
import itertools
import warnings

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import tiny, token_ids
from tests.generate.test_speculative import BATCH, FEW, both
from tsa_compile import cuda_graphs
from tsa_compile.generate import drafts
from tsa_compile.generate.draft_loop import DraftLoop, why_not
from tsa_compile.generate.drafts import PolicyDraft
from tsa_compile.session import attached
from tsa_compile.steps import FIXED, REPLAYED

transformers = pytest.importorskip("transformers")

LISTS = tsa.Remembered("verify", keys=6, ratio=0.1)
SAMPLED = dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9)
READS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture(scope="module")
def models():
    """(untouched, transformed)."""
    torch._dynamo.reset()
    plain, ours = (tiny("llama", layers=1) for _ in range(2))
    return plain, tsa.transform(ours, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))


@pytest.mark.parametrize("how", [pytest.param({}, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", [pytest.param(FEW, marks=pytest.mark.slow), LISTS], ids=["pages", "verify"])
def test_one_call_is_the_steps_one_by_one(models, how, draft, monkeypatch):
    """The same drafts, drawn from the same numbers, of rows of several lengths in one cache, too."""
    for call in ({}, BATCH):
        torch.manual_seed(3)
        _, at_once, seen = both(models, draft, **call, **how)
        assert seen.draft_loops * 4 == seen.draft_steps > 0
        with monkeypatch.context() as patched:
            patched.setattr(drafts, "why_not", lambda processors: "not today")
            torch.manual_seed(3)
            _, one_by_one, slowly = both(models, draft, **call, **how)
        assert slowly.draft_loops == 0
        assert torch.equal(at_once, one_by_one)
        assert seen.acceptance == slowly.acceptance
        assert 0 < sum(seen.acceptance) < 4


class CountedDraft(PolicyDraft):
    """Knows how many reads of tensors stood before each of its rounds."""

    reads = 0

    def propose(self, request, n):
        self.before.append(CountedDraft.reads)
        return super().propose(request, n)


@pytest.mark.parametrize("call", [pytest.param({}, marks=pytest.mark.slow), BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("how", [pytest.param({}, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"])
def test_the_host_reads_the_device_once_a_round(models, how, call, monkeypatch):
    """What was accepted, and which rows have ended: by one `tolist`. All graphs are there from an earlier request."""
    call = dict(call, eos_token_id=127, pad_token_id=0)
    both(models, LISTS, **call, **how)
    draft = CountedDraft(LISTS)
    object.__setattr__(draft, "before", [])
    names = []

    def counted(name, own):
        def read(tensor, *args, **kwargs):
            CountedDraft.reads += 1
            names.append(name)
            return own(tensor, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    both(models, draft, **call, **how)
    between = [b - a for a, b in itertools.pairwise(draft.before)]
    assert len(between) > 3
    assert set(between) == {1}, names


def test_a_loop_is_one_recording(models, monkeypatch):
    """A request has three: the loop, its verify step, and the plain step at the end. The next one replays them."""
    made = []

    class Counted(cuda_graphs.Again):
        def __init__(self, call, cache):
            made.append(type(call.func))  # the call itself holds the cache

    monkeypatch.setattr(cuda_graphs, "Again", Counted)
    session = attached(models[1])
    session.steps.recorded_on = frozenset({"cpu"})
    try:
        for _ in range(2):
            gc.collect()
            before = dict(session.steps.counts())
            want, got, seen = both(models, LISTS, max_new_tokens=25)
            assert torch.equal(want, got)
        after = session.steps.counts()
    finally:
        session.steps.recorded_on = frozenset({"cuda"})
        session.steps.recordings.clear()
    assert made.count(DraftLoop) == 1
    assert len(made) <= 3
    assert after[REPLAYED] - before.get(REPLAYED, 0) == seen.draft_steps + seen.verify_steps + seen.plain_steps
    assert after[FIXED] == before[FIXED]


def test_loops_are_told_apart_by_what_they_do():
    warpers = transformers.generation.logits_process
    lists = [
        [],
        [warpers.TemperatureLogitsWarper(0.5)],
        [warpers.TemperatureLogitsWarper(0.7)],
        [warpers.TemperatureLogitsWarper(0.5), warpers.TopKLogitsWarper(5)],
    ]
    keys = [DraftLoop(n, x, sampled).key for n in (2, 3) for x in lists for sampled in (False, True)]
    assert len(set(keys)) == 16
    assert DraftLoop(2, [warpers.TopKLogitsWarper(5)], True).key == DraftLoop(2, [warpers.TopKLogitsWarper(5)], True).key
    assert why_not([warpers.TopPLogitsWarper(0.9)]) is None
    assert "RepetitionPenaltyLogitsProcessor" in why_not([warpers.RepetitionPenaltyLogitsProcessor(1.2)])


def test_processors_that_look_at_tokens_are_asked_step_by_step(models):
    want, got, seen = both(models, FEW, repetition_penalty=1.7)
    assert torch.equal(want, got)
    assert seen.draft_loops == 0 < seen.draft_steps
    assert any("one by one" in note and "RepetitionPenalty" in note for note in seen.notes)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("call", [{}, BATCH], ids=["one", "batch"])
def test_a_round_waits_once_on_a_gpu(how, call):
    """`torch.cuda.set_sync_debug_mode` sees every wait: the rounds of a request that replays all its steps have one each."""
    torch._dynamo.reset()
    model = tsa.transform(tiny("llama").cuda(), tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))
    given = dict(inputs=call.get("ids", token_ids(40)).cuda(), max_new_tokens=24, draft=CountedDraft(LISTS), gamma=4, **how)
    given |= {"attention_mask": call["attention_mask"].cuda()} if call else {}
    object.__setattr__(given["draft"], "before", [])
    for _ in range(3):
        gc.collect()
        tsa.generate(model, **given)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        CountedDraft.propose, own = lambda self, *args: (rounds.append(len(waits)), own(self, *args))[1], CountedDraft.propose
        rounds: list[int] = []
        try:
            tsa.generate(model, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            CountedDraft.propose = own
    between = [b - a for a, b in itertools.pairwise(rounds)]
    assert len(between) > 2
    assert set(between) == {1}, [str(w.message) for w in waits]
