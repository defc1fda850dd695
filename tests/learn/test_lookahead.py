"""Training a lookahead index: labels by their definition, what it learns on a tiny model, and a plan that a new process runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.cache.test_generate import generate
from tests.learn.topics import topic_model, topic_text
from tsa_compile.index_weights import load_indexes
from tsa_compile.kernels.types import Rotation
from tsa_compile.learn import indexer_state, lookahead
from tsa_compile.learn.lookahead import train_lookahead
from tsa_compile.learn.lookahead_labels import Windows, draw_rows
from tsa_compile.learn.lookahead_loss import drawn, focal_loss
from tsa_compile.learn.lookahead_recall import BEST, CHANCE, MEANS, lookahead_recall
from tsa_compile.learn.lookahead_settings import LookaheadTraining
from tsa_compile.learn.rotations import rotations_of

transformers = pytest.importorskip("transformers")
POLICY = tsa.Resident(keep=0.4, interval=16, recent=2)
PLAN = tsa.Plan(prefill=tsa.Dense(), decode=POLICY)
QUICK = LookaheadTraining(rank=32, rows=32, epochs=2, reuse=2, lr=1e-2)
MARGIN = 0.15  # of recall, over first weights; measured: 0.186


def test_labels_are_the_pages_that_enough_layers_need():
    """70 tokens, windows of 7, by a loop over layers, tokens and heads."""
    g = torch.Generator().manual_seed(0)
    layers = [(torch.randn(4, 70, 8, generator=g) * 2, torch.randn(2, 70, 8, generator=g)) for _ in range(3)]
    rows = torch.tensor([40, 63, 67])
    windows = Windows(70, rows, 7, 1, 1, 0.5)
    for q, k in layers:
        windows.add(q, k, 0.4)
    for n, row in enumerate(rows.tolist()):
        free = range(1, row // 16)  # neither the first page, nor the one of the row, which is the last
        assert windows.candidates[n].nonzero()[:, 0].tolist() == [*free]
        tokens, mass, needed = range(row + 1, min(70, row + 8)), torch.zeros(4), {1: set(), 2: set(), 3: set()}
        for t in tokens:
            layers_of = torch.zeros(4)
            for q, k in layers:
                shares = sum((q[h, t].double() @ k[h // 2, : t + 1].double().mT * 0.4).softmax(-1) for h in range(4)) / 4
                by_page = torch.tensor([float(shares[16 * p : 16 * p + 16].sum()) if p in free else 0.0 for p in range(4)])
                mass += by_page / len(tokens)
                held = 0.0
                for p in by_page.argsort(descending=True).tolist():
                    if held < 0.5 * by_page.sum():
                        layers_of[p] += 1
                        held += float(by_page[p])
            for agree, pages in needed.items():
                pages |= {*(layers_of >= agree).nonzero()[:, 0].tolist()}
        torch.testing.assert_close(windows.mass[n], mass, rtol=1e-5, atol=1e-6)
        assert [{*windows.needed(agree)[n].nonzero()[:, 0].tolist()} for agree in needed] == [*needed.values()]
    assert windows.layers == 3


def test_the_loss_is_focal_over_needed_pages_and_a_few_others():
    g = torch.Generator().manual_seed(1)
    needed, candidates = (torch.rand(5, 40, generator=g) < share for share in (0.1, 0.7))
    taken = drawn(needed, candidates, 3, g)
    assert torch.equal(taken & needed, candidates & needed)
    assert not (taken & ~candidates).any()
    assert (taken & ~needed).sum() == 3 * (candidates & needed).sum()
    logits = torch.randn(5, 40, generator=g)
    right = torch.where(needed, logits.sigmoid(), 1 - logits.sigmoid())[taken].double()
    torch.testing.assert_close(focal_loss(logits, needed, taken, 2.0).double(), -((1 - right) ** 2 * right.log()).mean())


def test_queries_are_drawn_where_there_is_something_to_choose():
    rows = draw_rows(200, 1000, 20, 1, 3, torch.Generator())
    assert (int(rows.min()), int(rows.max())) == (80, 179)
    with pytest.raises(ValueError, match="a text of 100 tokens has no query behind token 80 with 20 tokens after it"):
        draw_rows(100, 10, 20, 1, 3, torch.Generator())


@pytest.fixture(scope="module")
def model():
    return topic_model()


@pytest.fixture(scope="module", autouse=True)
def not_traced():
    """The model's rotations, which `rotations_of` reads off a trace of seconds (`test_a_new_process_goes_by_the_saved_index`)."""

    def known(model):
        rotation = Rotation(tuple(model.model.rotary_emb.inv_freq.tolist()), False, 1.0)
        return {f"model.layers.{n}.self_attn": rotation for n in range(2)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookahead, "rotations_of", known)
        yield


@pytest.fixture(scope="module")
def texts():
    return [topic_text(512, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def trained(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    before = [p.clone() for p in model.parameters()]
    plan = train_lookahead(model, texts, PLAN, folder / "plan.json", QUICK, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return folder, plan


def gain(model, texts, folder, other):
    """Recall on other texts, over that of first weights; and all recalls."""
    train_lookahead(model, texts[:1], PLAN, other / "first.json", dataclasses.replace(QUICK, epochs=0), progress=False)
    kinds = {"trained": load_indexes(folder / "plan.safetensors"), "first": load_indexes(other / "first.safetensors")}
    found = lookahead_recall(model, [topic_text(512, 100 + n) for n in range(3)], kinds, POLICY, rows=24, progress=False)
    return found["trained"] - found["first"], found


def test_it_learns_which_pages_the_next_steps_need(model, texts, trained, tmp_path):
    more, found = gain(model, texts, trained[0], tmp_path)
    losses = trained[1].notes["lookahead"]["loss of each text"]
    assert more > MARGIN
    assert found[BEST] > found[MEANS] > found[CHANCE] + MARGIN  # there is something to be learned
    assert found[BEST] > found["trained"] > found[CHANCE] + MARGIN
    assert len(losses) == 12
    assert sum(losses[6:]) < 0.9 * sum(losses[:6])


@pytest.mark.slow
def test_with_shuffled_labels_it_learns_nothing(model, texts, tmp_path, monkeypatch):
    """Each query gets the labels of another one, on pages in another order."""
    needed = Windows.needed

    def shuffled(self, agree):
        g, labels = torch.Generator().manual_seed(len(self.rows) + int(self.rows[0])), needed(self, agree)
        for n, candidates in enumerate(self.candidates):
            own = candidates.nonzero()[:, 0]
            labels[n, own] = labels[n, own[torch.randperm(len(own), generator=g)]]
        return labels

    monkeypatch.setattr(Windows, "needed", shuffled)
    train_lookahead(model, texts, PLAN, tmp_path / "plan.json", QUICK, progress=False)
    assert gain(model, texts, tmp_path, tmp_path)[0] < MARGIN


def test_an_interrupted_training_goes_on_with_the_same_result(model, texts, trained, tmp_path, monkeypatch):
    saved, calls = indexer_state.TrainingState.did, []

    def interrupted(self, done, losses):
        saved(self, done, losses)
        calls.append(done)
        if done == 5:
            raise KeyboardInterrupt

    out = (model, texts, PLAN, tmp_path / "plan.json")
    monkeypatch.setattr(indexer_state.TrainingState, "did", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_lookahead(*out, QUICK, state=tmp_path / "state", progress=False)
    monkeypatch.setattr(indexer_state.TrainingState, "did", saved)
    train_lookahead(*out, QUICK, state=tmp_path / "state", progress=False)
    assert calls == [1, 2, 3, 4, 5]
    whole, parts = (load_indexes(folder / "plan.safetensors") for folder in (trained[0], tmp_path))
    for path, index in whole.items():
        for name in index.tensors:
            torch.testing.assert_close(getattr(parts[path], name), getattr(index, name), rtol=1e-5, atol=1e-6)
    other = dataclasses.replace(PLAN, decode=dataclasses.replace(POLICY, interval=20))
    with pytest.raises(ValueError, match="of another training, with another interval"):
        train_lookahead(model, texts, other, tmp_path / "x.json", QUICK, state=tmp_path / "state", progress=False)


IN_A_NEW_PROCESS = """
import json, sys
import torch
from transformers import DynamicCache
import tsa_compile as tsa
from tests.cache.models import cache_name
from tests.cache.test_generate import generate
from tests.learn.topics import topic_model, topic_text

model = tsa.transform(topic_model(), tsa.Plan.load(sys.argv[1]))
cache = DynamicCache(config=model.config)
tokens = generate(model, input_ids=topic_text(1200, 7)[None], max_new_tokens=8, **{cache_name(model): cache})
layer = cache.layers[0]
counts = layer.resident.counts
print(json.dumps([tokens[0, -8:].tolist(), sorted(layer.resident.slots[0]), layer.length, layer.count(), counts.refreshes]))
"""


@pytest.mark.slow  # another process, and traces
def test_a_new_process_goes_by_the_saved_index(model, texts, tmp_path, monkeypatch):
    """The pages that it makes resident are those of the trained scores, by hand; the pool is smaller than the sequence."""
    monkeypatch.setattr(lookahead, "rotations_of", rotations_of)
    folder, plan = tmp_path, train_lookahead(model, texts, PLAN, tmp_path / "plan.json", QUICK, progress=False)
    assert tsa.Plan.load(folder / "plan.json") == plan
    assert plan.decode == dataclasses.replace(POLICY, index="learned", layers=(0, 1))
    made = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, folder / "plan.json"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    tokens, slots, pool, rows, refreshes = json.loads(made.stdout.splitlines()[-1])
    assert pool < rows == 1207
    assert refreshes == 1  # by the first step's queries
    queries, text = {}, topic_text(1200, 7)
    first = int(generate(model, input_ids=text[None], max_new_tokens=1)[0, -1])
    ids = torch.cat([text, torch.tensor([first])])[None]
    with torch.no_grad(), lookahead.watched(model, lambda path, q, k, scale: queries.update({path: (q, k)})):
        model(input_ids=ids, use_cache=False)
    scores = []
    for path, index in load_indexes(folder / "plan.safetensors").items():
        q, k = queries[path]
        means = k[:, :, :1200].unflatten(2, (75, 16)).mean(3)
        scores.append(index.logits(q[:, :, 1200:], torch.tensor([[1200]]), means)[0, 0].sigmoid())
    free = torch.stack(scores).amax(0)[1:74]  # page 0 is the sink; 74, whole, and 75, open, are the last
    budget = -(-76 * 2 // 5)
    want = {0, 74, *(free.argsort(descending=True, stable=True)[: budget - 3] + 1).tolist()}
    assert {*slots} - {75} == want
    assert tokens[0] == first


def test_what_is_wrong_is_named(model, texts, trained, tmp_path):
    for change, message in (
        (dict(rows=0), "LookaheadTraining.rows must be an int >= 1, got 0"),
        (dict(rank=0), "LookaheadTraining.rank must be an int >= 1, or None, got 0"),
        (dict(top_p=1.0), r"LookaheadTraining.top_p must be in \(0, 1\), gamma at least 0 and lr above 0, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LookaheadTraining(**change)
    for plan, training, message in (
        (tsa.Plan(decode=tsa.Exact()), QUICK, "plan: its decode must be a Resident, got Exact"),
        (PLAN, dataclasses.replace(QUICK, heads=3), "LookaheadTraining.heads: 3, which 2 KV heads cannot share evenly"),
    ):
        with pytest.raises(ValueError, match=message):
            train_lookahead(model, texts, plan, tmp_path / "x.json", training, progress=False)
    learned = dataclasses.replace(POLICY, index="learned")
    with pytest.raises(ValueError, match=r"Resident.index='learned' needs weights; Plan.weights names none"):
        tsa.transform(tiny_llama(num_hidden_layers=2), tsa.Plan(decode=learned))
    plan = dataclasses.replace(trained[1], decode=dataclasses.replace(learned, layers=(0, 2)))
    with pytest.raises(ValueError, match=r"Resident.layers: no learned index for layers \[2\]; the weights are for \[0, 1\]"):
        tsa.transform(tiny_llama(num_hidden_layers=3, head_dim=16), plan)
