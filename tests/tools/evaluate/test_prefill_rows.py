"""What a plan costs a prompt's rows: against plain formulas on a random model, and a command that goes on."""

from __future__ import annotations

import json

import pytest
import torch

import tsa_compile as tsa
from tests.tools.evaluate.tiny_lm import byte_tokenizer, tiny_lm
from tsa_compile.tools.evaluate import prefill_rows
from tsa_compile.tools.evaluate.forced_pairs import force, scaled
from tsa_compile.tools.evaluate.rows_meter import RowsMeter
from tsa_compile.tools.evaluate.runner import Runner

POLICY = tsa.BlockSparse(alpha=0.7, window=32, last_dense=100)
LENGTH, ROWS = 900, 768  # tokens, and rows before the blocks that last_dense makes dense


@pytest.fixture(scope="module")
def model():
    """Queries and keys large enough that blocks differ."""
    torch.manual_seed(0)
    network = tiny_lm()
    for layer in network.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
        layer.self_attn.k_proj.weight.data *= 40
    return network


@pytest.fixture(scope="module")
def meter(model):
    return RowsMeter(Runner(model), texts(1)["text 0"])


def texts(number):
    torch.manual_seed(5)
    few = torch.randint(2, 258, (8, 3))
    pick = lambda: torch.cat([few[n][torch.randint(0, 3, (100,))] for n in torch.randint(0, 8, (9,))])  # noqa: E731
    return {f"text {n}": pick() for n in range(number)}


def test_rows_are_those_of_the_transformed_model(model, meter):
    """All layers but the first, by rules with paths of the whole model."""
    ids = texts(1)["text 0"]
    plan = tsa.Plan(prefill=tsa.Dense(), rules=[("model.layers.[1-3].*", "prefill", POLICY)])
    row = meter.measure(ids, plan)
    with torch.no_grad():
        dense = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        tsa.transform(model, plan)
        sparse = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        tsa.restore(model)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    assert row["sparse_rows"] == ROWS
    assert row["kl_end"] == pytest.approx(kl[ROWS - 128 : ROWS].mean().item(), rel=1e-2, abs=1e-9)
    assert row["kl_middle"] == pytest.approx(kl[386 : 386 + 128].mean().item(), rel=1e-2, abs=1e-9)
    for name, logits in (("dense_perplexity", dense), ("perplexity", sparse)):
        losses = -logits[: ROWS - 1].gather(1, ids[1:ROWS, None])
        assert row[name] == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    assert len(row["by_layer"]) == 3
    assert row["worst_head"] >= row["worst_layer"] >= row["error"] > 0
    assert 0.25 < row["pairs"] < 1


def test_a_plan_is_forced_to_a_share_of_the_pairs(meter):
    ids = texts(1)["text 0"]
    plan = tsa.Plan(prefill=tsa.Dense(), rules=[("model.layers.*", "prefill", tsa.BlockSparse(0.01, window=32, last_dense=100))])
    before = meter.pairs(ids, plan)
    forced, factor = force(plan, 0.9 * before, lambda tried: meter.pairs(ids, tried))
    assert factor > 1
    assert forced == scaled(plan, factor)
    assert 0.8 * before < meter.pairs(ids, forced) <= 0.9 * before
    with pytest.raises(ValueError, match=r"more than 0\.01"):
        force(plan, 0.01, lambda tried: meter.pairs(ids, tried))


def test_a_factor_is_for_every_alpha():
    plan = tsa.Plan(
        prefill=tsa.BlockSparse((0.1, 0.5)), rules=[("a.*", "prefill", tsa.BlockSparse(0.2)), ("b", "prefill", tsa.Dense())]
    )
    twice = scaled(plan, 4.0)
    assert (twice.prefill.alpha, [getattr(r.policy, "alpha", None) for r in twice.rules]) == ((0.4, 0.999), [0.8, None])


def test_other_policies_are_refused(meter):
    ids = texts(1)["text 0"]
    with pytest.raises(ValueError, match="4 attentions of the plan select, of which 0 are BlockSparse"):
        meter.measure(ids, tsa.Plan(prefill=tsa.TokenSparse(min_tokens=8)))


def test_texts_of_the_calibration_are_no_others():
    few, rest = prefill_rows.split(dict.fromkeys(map(str, range(11)), torch.zeros(1)), 3)
    assert (list(few), len(rest)) == (["2", "6", "9"], 8)
    assert prefill_rows.split({"a": torch.zeros(1)}, 0)[0] == {}


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prefill_rows, "load_model", lambda name: (model, byte_tokenizer(False)))
    monkeypatch.setattr(prefill_rows, "standard_texts", lambda tokenizer, length, number: texts(number))
    given = dict(length=LENGTH, texts=2, calibrated=1, pairs=0.8, policy='{"window": 32, "last_dense": 100}', method="error")
    prefill_rows.main("tiny", tmp_path, **given, seconds=0.0)
    assert "Not complete" in capsys.readouterr().out
    measured = []
    monkeypatch.setattr(RowsMeter, "measure", lambda *args, own=RowsMeter.measure: measured.append(1) or own(*args))
    prefill_rows.main("tiny", tmp_path, **given)
    out = capsys.readouterr().out
    assert "| one alpha | 2 |" in out
    assert "| calibrated | 2 |" in out
    assert len(measured) == 3
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(sum(r["pairs"] for r in rows if r["plan"] == name) / 2 <= 0.8 for name in ("one alpha", "calibrated"))
    assert tsa.Plan.load(tmp_path / "plan.json").notes["target"] == "pairs<=0.8"
