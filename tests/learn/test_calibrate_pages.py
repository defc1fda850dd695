"""Calibration of decode by pages: what attentions are told as they run, budgets by head against brute force, plans that hold."""

from __future__ import annotations

import itertools

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tsa_compile.learn.page_meter import PageMeter, changed
from tsa_compile.learn.page_run import PageTables
from tsa_compile.learn.text_decoder import TextDecoder

pytest.importorskip("transformers")
LAST, KEEPS = 3, (0.2, 0.5, 1.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = tiny_llama(num_hidden_layers=2).eval()
    for p in made.parameters():
        p.data *= 2.0 if p.dim() > 1 else 1.0  # attention that is not uniform
    return made


@pytest.fixture(scope="module")
def texts(model):
    return [torch.randint(1, model.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(n)) for n in (260, 300)]


@pytest.fixture(scope="module")
def meter(model, texts):
    meter = PageMeter(model, tsa.PageSparse(0.3, "basis", completion=True), LAST)
    assert meter.find_layers(texts[0]) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    return meter


def test_a_candidate_is_what_its_plan_would_be(model, meter, texts):
    ids, (first, second) = texts[0], meter.layers
    keeps = {first: (0.5,) * meter.lists[0], second: (0.2, *(0.9,) * (meter.lists[1] - 1))}
    sample = meter.sample(ids, keeps)
    rules = tuple(tsa.plan.Rule(layer, "decode", tsa.PageSparse(keep, "basis", completion=True)) for layer, keep in keeps.items())
    plan = tsa.Plan(prefill=tsa.Dense(), decode=tsa.PageSparse(0.3, "basis", completion=True), rules=rules)
    kl = TextDecoder(model, plan, LAST).compared(ids, plan, lambda p, q: torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True))  # fmt: skip
    assert sample.kl == pytest.approx(sum(kl) / LAST, rel=1e-3, abs=1e-6)
    assert sample.worst == pytest.approx(max(kl), rel=1e-3, abs=1e-6)
    wanted = [-(-17 * keep // 1) / 17 for layer in keeps.values() for keep in layer]  # of 17 pages, rounded up
    assert sample.pages == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
    exact = meter.sample(ids, {})
    assert (exact.pages, exact.top1) == (1.0, 1.0)
    assert exact.kl < 1e-6 < sample.kl


def test_tables_fall_as_more_is_read(meter, texts):
    errors, read = meter.tables(texts[0], KEEPS)
    assert errors.shape == read.shape == (3, sum(meter.lists))
    assert (errors[-1] < 1e-9).all()
    assert (read[-1] == 1).all()
    assert (errors[0] > errors[1]).float().mean() > 0.5
    assert (read.diff(dim=0) > 0).all()
    assert meter.projected


def test_errors_are_those_of_the_projected_output():
    outs, exact, weight = torch.randn(3, 1, 6, 1, 4), torch.randn(1, 6, 1, 4), torch.randn(10, 24)
    got = changed(outs, exact, weight, 2)
    for n, g in itertools.product(range(3), range(2)):
        part = torch.zeros(6, 4)
        part[3 * g : 3 * g + 3] = (outs[n] - exact)[0, 3 * g : 3 * g + 3, 0]
        expected = (weight @ part.flatten()).square().sum() / (weight @ exact.flatten()).square().sum()
        torch.testing.assert_close(got[n, g], expected)
    torch.testing.assert_close(
        changed(outs, exact, None, 2).sum(1), (outs - exact).square().sum((1, 2, 3, 4)) / exact.square().sum()
    )


def test_budgets_are_those_of_brute_force():
    errors = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).sort(0, descending=True).values
    errors = torch.stack([errors[0] + 1, errors[0] / 2, errors[0] / 8])  # convex, so that a price finds the best
    tables = PageTables((0.1, 0.4, 1.0), errors, torch.tensor([[0.1], [0.4], [1.0]]).double().expand(3, 4), ("a", "b"), (3, 1))
    for share in (0.1, 0.4, 0.55, 1.0):
        found = [keep for part in tables.fit(share).values() for keep in part]
        options = [o for o in itertools.product(range(3), repeat=4) if sum(tables.keeps[i] for i in o) / 4 <= share + 1e-9]
        best = min(sum(float(errors[i, n]) for n, i in enumerate(o)) for o in options)
        cost = sum(float(errors[tables.keeps.index(keep), n]) for n, keep in enumerate(found))
        assert sum(found) / 4 <= share + 1e-9
        assert cost <= best + float(errors[0].max())  # within one step of one head
    assert tables.fit(0.1) == tables.one(0.1) == {"a": (0.1,) * 3, "b": (0.1,)}
    weighed = tables.fit(0.4, {"a": 1e-6, "b": 1.0})
    assert weighed["b"] == (1.0,)


def test_wrong_arguments_are_named(model, texts):
    for given, message in (
        ({"policy": tsa.PageSparse(pages=4)}, "policy must have one keep"),
        ({"keeps": (0.1, 2.0)}, r"keeps must be two or more numbers in \(0, 1\], got \(0.1, 2.0\)"),
        ({"target": "pairs<=0.1"}, 'target must be "kl<=X" or "pages<=X" for PageSparse'),
        ({"method": "drift"}, "method must be one of .* for PageSparse, got 'drift'"),
        ({"alphas": (0.1, 0.2)}, "alphas must be None for PageSparse"),
        ({"policy": tsa.BlockSparse(), "keeps": (0.1, 0.2)}, "keeps must be None for BlockSparse"),
    ):
        with pytest.raises(ValueError, match=message):
            tsa.calibrate(model, texts, **{"target": "pages<=0.2", "policy": tsa.PageSparse(0.2), "progress": False, **given})


@pytest.mark.slow
def test_a_plan_meets_its_target_and_a_second_call_measures_nothing(model, texts, tmp_path):
    options = dict(keeps=KEEPS, last=LAST, state=tmp_path / "state.json", progress=False)
    for policy, target in ((tsa.PageSparse(0.3, completion=True), "pages<=0.45"), (tsa.PageSparse(0.3, "basis"), "kl<=1e-3")):
        options["state"] = tmp_path / f"{target[:2]}.json"
        plan = tsa.calibrate(model, texts, target, policy=policy, **options)
        measured = plan.notes["measured"]
        assert measured["pages"] <= 0.45 if target[0] == "p" else measured["kl"] <= 1e-3
        assert plan.notes["sparse layers"] == "2 of 2"
        assert {rule.policy.kind for rule in plan.rules} == {policy.kind}
        assert tsa.Plan.from_dict(plan.to_dict()) == plan
        before = options["state"].read_text()
        assert tsa.calibrate(model, texts, target, policy=policy, **options).rules == plan.rules
        assert options["state"].read_text() == before
    with pytest.raises(ValueError, match=r"cannot be met: kl is .* with keep 0\.3"):
        tsa.calibrate(
            model, texts, "kl<=1e-12", policy=tsa.PageSparse(0.3), keeps=(0.2, 0.3), last=LAST, method="one", progress=False
        )
