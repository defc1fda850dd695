"""Sparrow's gate: the statistic by its formula, and the cheapest schedule that reaches the threshold in its worst bin."""

from __future__ import annotations

import json

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.cache.models import cache_name
from tsa_compile.kernels.select.top_pages.budget import budget
from tsa_compile.learn import gate
from tsa_compile.learn.acceptance import acceptance, tails, worst
from tsa_compile.policies.schedules import SCHEDULES
from tsa_compile.tools import gate_cli

LAST = 12


def test_acceptance_is_the_common_mass():
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    by_hand = [
        sum(min(float(a), float(b)) for a, b in zip(*pair, strict=True))
        for pair in zip(p.softmax(-1), q.softmax(-1), strict=True)
    ]
    torch.testing.assert_close(acceptance(p, q), torch.tensor(by_hand))
    torch.testing.assert_close(acceptance(p, p + 3.0), torch.ones(5))
    apart = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    assert acceptance(*apart).item() < 1e-30


def test_the_tail_of_each_bin_counts_and_the_mean_does_not():
    accepted = [0.5] * 6 + [1.0] * 94 + [0.8] * 100
    positions = [*range(1900, 2000), *range(2000, 2100)]
    assert tails(accepted, positions) == {0: pytest.approx(0.5), 1: pytest.approx(0.8)}
    assert worst(tails(accepted, positions)) == pytest.approx(0.5)
    assert tails(accepted[6:], positions[6:])[0] == 1.0


def test_published_schedules_hold_at_every_edge_of_their_bins():
    assert len(SCHEDULES) == 20
    for name, entries in SCHEDULES.items():
        assert len(entries) == 20
        assert list(entries) == sorted(entries)
        table = [*map(lambda n: n + 3, entries)]
        for n in range(25):
            for pages in (125 * n, 125 * n + 1, 125 * n + 124):
                assert budget(pages, 0, table) == entries[min(n, 19)] + 3, (name, pages)
    assert SCHEDULES["sparrow-4b-0.86"] == (29, 45, 61, 77, 93, 125, 157, 221, 253, 253, *[317] * 4, *[381] * 4, 509, 509)
    assert SCHEDULES["sparrow-14b-0.86"][-3:] == (637, 893, 893)


def test_a_schedule_by_name_is_its_entries():
    named, entries = (tsa.PageSparse(schedule=s) for s in ("sparrow-8b-0.87", SCHEDULES["sparrow-8b-0.87"]))
    assert named.budget == entries.budget
    assert named.to_dict()["schedule"] == "sparrow-8b-0.87"
    with pytest.raises(ValueError, match=r"PageSparse.schedule must be one of .* got 'sparrow-9b-0.86'"):
        tsa.PageSparse(schedule="sparrow-9b-0.86")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=2, initializer_range=0.12)


@pytest.fixture(scope="module")
def prompts():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(1, 128, (n,), generator=g) for n in (200, 150)]


SMALL = [(0,), (4,), (50,)]  # beside 3 pages, of 13 and 10
OPTIONS = dict(schedules=SMALL, last=LAST, dense_layers=1, progress=False)


@pytest.fixture(scope="module")
def plans(model, prompts, tmp_path_factory):
    """A plan that tried all schedules, and one for a low threshold, from what was measured for the first."""
    torch._dynamo.reset()
    state = tmp_path_factory.mktemp("gate") / "state.json"
    high = gate.choose_schedule(model, prompts, 1.0 - 1e-4, state=state, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.TextDecoder, "compared", lambda *_: pytest.fail("measured again"))
        return gate.choose_schedule(model, prompts, 0.01, state=state, **OPTIONS), high


def test_the_cheapest_schedule_that_reaches_the_threshold(plans):
    low, high = plans
    assert low.decode == tsa.PageSparse(schedule=(0,), sinks=1, recent=2)
    assert high.decode == tsa.PageSparse(schedule=(50,), sinks=1, recent=2)
    assert low.policy_at("model.layers.0.self_attn", "decode", 0) == tsa.Exact()
    assert low.policy_at("model.layers.1.self_attn", "decode", 1) == low.decode
    tried = high.notes["tried"]
    assert list(tried) == ["0", "4", "50"]
    statistics = [worst(found["5th percentile by bin"]) for found in tried.values()]
    assert statistics[0] < 0.999 < statistics[2]
    assert tried["50"]["pages read"] == 1.0
    assert 0.2 < tried["0"]["pages read"] < 0.31
    assert tsa.Plan.from_dict(json.loads(json.dumps(high.to_dict()))) == high


def test_the_statistic_is_that_of_a_rollout_by_hand(model, prompts, plans):
    """Decode steps of the transformed model, one by one, against the dense model."""
    found = []
    with torch.no_grad():
        dense = [model(input_ids=ids[None]).logits[0, -LAST:] for ids in prompts]
        tsa.transform(model, gate.schedule_plan((4,), dense_layers=1))
        try:
            for ids, want in zip(prompts, dense, strict=True):
                given = {cache_name(model): tsa.Cache(model, 1, 256)}
                model(input_ids=ids[None, :-LAST], **given)
                for n in range(LAST):
                    at = len(ids) - LAST + n
                    found.append(float(acceptance(want[n], model(input_ids=ids[None, at : at + 1], **given).logits[0, -1])))
        finally:
            tsa.restore(model)
    want = plans[1].notes["tried"]["4"]["5th percentile by bin"]["0"]
    assert tails(found, [0] * len(found))[0] == pytest.approx(want, abs=1e-5)


def test_what_is_wrong_is_named(model, prompts, monkeypatch):
    monkeypatch.setattr(gate.TextDecoder, "compared", lambda *_: [0.5] * LAST)
    for prompts_, change, message in (
        (prompts, {"threshold": 0.6}, r"no schedule reaches 0.6 in its worst bin; the nearest is 0 with 0.5"),
        ([prompts[0][:10]], {}, "prompt 0 has 10 tokens, of which the last 12"),
        (prompts, {"threshold": 0}, r"threshold must be in \(0, 1\], got 0"),
        (prompts, {"schedules": ["sparrow"]}, "PageSparse.schedule must be one of"),
        (prompts, {"schedules": []}, "schedules must name at least one"),
        (prompts, {"last": 0}, "last must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            gate.choose_schedule(model, prompts_, **OPTIONS | change)


def test_a_model_whose_steps_are_not_replaced_measures_nothing(model, prompts):
    with pytest.raises(ValueError, match="no attention of a decode step takes PageSparse"):
        gate.choose_schedule(model, prompts, **OPTIONS | {"dense_layers": 2, "schedules": SMALL[:1]})


def test_the_command_writes_plan_and_page(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gate.TextDecoder, "compared", lambda *_: [0.9] * LAST)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(ids.tolist()) for ids in prompts))
    plan, page = (str(tmp_path / name) for name in ("plan.json", "page.html"))
    texts = [str(tmp_path / "texts.jsonl")]
    gate_cli.gate(str(tmp_path / "model"), texts, plan, 0.86, LAST, "sparrow-4b-0.75", None, None, page)
    assert "sparrow-4b-0.75, 100.0% of the pages read" in capsys.readouterr().out
    assert tsa.Plan.load(plan).decode.schedule == "sparrow-4b-0.75"
    text = (tmp_path / "page.html").read_text()
    assert "sparrow-4b-0.75 (chosen)" in text
    assert "polyline" in text
