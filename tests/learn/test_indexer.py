"""Training an index: top-p without sorting, first weights, the loss by its definition, and a trained plan that a model runs."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.cache.models import cache_name
from tsa_compile.index_weights import load_indexes
from tsa_compile.learn import indexer, indexer_state
from tsa_compile.learn.indexer import train_indexer
from tsa_compile.learn.indexer_loss import divergence, teacher_of
from tsa_compile.learn.indexer_recall import recalls
from tsa_compile.learn.indexer_settings import Training, schedule
from tsa_compile.learn.indexer_start import start_weights
from tsa_compile.learn.top_p import top_p

PATH, WINDOW = "model.layers.{}.self_attn", 20
QUICK = Training(width=4, start_texts=2, rows=24, reuse=3, lr=2e-2, epochs=2)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=50), st.sampled_from([0.05, 0.5, 0.9, 1.0]))
def test_top_p_without_sorting_is_top_p_by_sorting(numbers, mass):
    got = top_p(torch.tensor(numbers).float()[None], mass)[0].nonzero()[:, 0].tolist()
    held, want = 0, []
    for n in sorted(range(len(numbers)), key=lambda n: (-numbers[n], n)):
        if held >= mass * sum(numbers):
            break
        held, want = held + numbers[n], [*want, n]
    assert got == sorted(want)
    assert sum(numbers[n] for n in got) >= mass * sum(numbers) - 1e-9, "by definition"


def test_first_weights_are_the_scores_themselves_at_full_width_and_the_best_of_their_rank_below():
    q, k = (torch.randn(500, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) for _ in range(2))
    moments, scores = (q.mT @ q, k.mT @ k), 0.3 * q @ k.mT
    errors = {}
    for init in ("balanced", "svd"):
        for width in (8, 3):
            query, key = (x.double() for x in start_weights(*moments, width, 0.3, init))
            errors[init, width] = float(((q @ query.mT) @ (k @ key.mT).mT - scores).norm() / scores.norm())
    assert max(errors["balanced", 8], errors["svd", 8]) < 2e-3
    assert errors["balanced", 3] <= errors["svd", 3]
    best = torch.linalg.svdvals(scores)
    assert errors["balanced", 3] == pytest.approx(float(best[3:].norm() / best.norm()), rel=1e-2)


def test_the_loss_is_kl_to_the_teachers_top_p_set():
    q, k, rows = torch.randn(5, 8), torch.randn(30, 8), torch.tensor([3, 10, 17, 28, 29])
    query, key = torch.randn(2, 4, 8, requires_grad=True).unbind(0)
    got = divergence(teacher_of(q, k, rows, 0.5, 0.8), query, key, q, k)
    want = []
    for n, row in enumerate(rows.tolist()):
        shares = (0.5 * q[n].double() @ k[: row + 1].double().mT).softmax(-1)
        order = shares.argsort(descending=True)
        chosen = order[: int((shares[order].cumsum(0) < 0.8).sum()) + 1]
        teacher = shares[chosen] / shares[chosen].sum()
        student = ((query @ q[n]) @ (k[: row + 1] @ key.mT).mT).double().log_softmax(-1)[chosen]
        want.append((teacher * (teacher.log() - student)).sum())
    torch.testing.assert_close(got.double(), torch.stack(want).mean(), rtol=1e-5, atol=1e-6)
    got.backward()


def test_the_learning_rate_rises_and_falls():
    assert [schedule(x) for x in (0.05, 0.1, 1.0)] == pytest.approx([0.5, 1.0, 0.0])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=2, head_dim=16, initializer_range=0.3)


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """The model's rotations are those of its first trace: each takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "rotations_of", functools.cache(indexer.rotations_of))
        yield


@pytest.fixture(scope="module")
def texts():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(1, 127, (n,), generator=g) for n in (150, 120, 140)]


@pytest.fixture(scope="module")
def roles():
    base = tsa.HeadSplit((), sinks=2, window=WINDOW)
    rules = [(PATH.format(n), "decode", dataclasses.replace(base, retrieval=h)) for n, h in enumerate(((0,), (1, 2)))]
    return tsa.Plan(prefill=tsa.Dense(), decode=base, rules=rules)


@pytest.fixture(scope="module")
def trained(model, texts, roles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    before = [p.clone() for p in model.parameters()]
    plan = train_indexer(model, texts, roles, folder / "plan.json", QUICK, state=folder / "state", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return folder, plan


def test_training_brings_the_projections_nearer_to_the_attention(model, texts, roles, trained, tmp_path):
    folder, plan = trained
    losses = plan.notes["index"]["KL of each text"]
    assert len(losses) == 6
    assert sum(losses[3:]) < 0.9 * sum(losses[:3])
    train_indexer(model, texts, roles, tmp_path / "first.json", dataclasses.replace(QUICK, epochs=0), progress=False)
    kinds = {
        name: load_indexes(path)
        for name, path in (("trained", folder / "plan.safetensors"), ("first", tmp_path / "first.safetensors"))
    }
    found = recalls(model, texts, kinds, 0.9, rows=40, progress=False)
    assert list(found) == ["trained", "first", "page means, as many pages", "the attention itself"]
    assert found["the attention itself"].recall >= 0.9
    assert all(0 < x.pages <= 1 and 0 < x.recall <= 1 for x in found.values())
    assert found["the attention itself"].pages <= found["trained"].pages


def test_an_interrupted_training_goes_on_with_the_same_result(model, texts, roles, trained, tmp_path, monkeypatch):
    saved, calls = indexer_state.TrainingState.did, []

    def interrupted(self, done, losses):
        saved(self, done, losses)
        calls.append(done)
        if done == 5:
            raise KeyboardInterrupt

    out = (tmp_path / "plan.json", QUICK)
    monkeypatch.setattr(indexer_state.TrainingState, "did", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_indexer(model, texts, roles, *out, state=tmp_path / "state", progress=False)
    monkeypatch.setattr(indexer_state.TrainingState, "did", saved)
    train_indexer(model, texts, roles, *out, state=tmp_path / "state", progress=False)
    assert calls == [1, 2, 3, 4, 5]
    whole, parts = (load_indexes(folder / "plan.safetensors") for folder in (trained[0], tmp_path))
    for path, index in whole.items():
        torch.testing.assert_close(parts[path].query, index.query, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[path].key, index.key, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="of another training, with another lr"):
        train_indexer(model, texts, roles, out[0], dataclasses.replace(QUICK, lr=1.0), state=tmp_path / "state", progress=False)


def test_the_plan_runs_and_reads_less(model, texts, trained):
    folder, plan = trained
    assert tsa.Plan.load(folder / "plan.json") == plan
    torch._dynamo.reset()
    tsa.transform(model, plan)
    try:
        given = {cache_name(model): tsa.Cache(model, 1, 200)}
        with torch.no_grad():
            model(input_ids=texts[0][None, :-1], **given)
            model(input_ids=texts[0][None, -1:], **given)
        sites = [site for site in tsa.report(model).sites if site.policy == "HeadSplit"]
        assert [(site.replaced, site.reason) for site in sites] == [(True, "")] * 2
    finally:
        tsa.restore(model)


def test_what_is_wrong_is_named(model, texts, roles, tmp_path):
    transformers = pytest.importorskip("transformers")
    for change, message in (
        (dict(rows=0), "Training.rows must be an int >= 1, got 0"),
        (dict(mass=1.0), r"Training.mass must be in \(0, 1\)"),
        (dict(init="zeros"), "got 0.9, 'zeros'"),
    ):
        with pytest.raises(ValueError, match=message):
            Training(**change)
    with pytest.raises(ValueError, match="no head looks things up"):
        train_indexer(model, texts, tsa.Plan(decode=tsa.HeadSplit(())), tmp_path / "x.json", progress=False)
    config = dict(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=256, bos_token_id=1, eos_token_id=2)
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    role = tsa.Plan(rules=[("transformer.h.0.attn", "decode", tsa.HeadSplit((0,)))])
    with pytest.raises(ValueError, match=r"queries and keys before rotation \(RoPE\) are not known: no rotation by positions"):
        train_indexer(plain, texts, role, tmp_path / "x.json", progress=False)
