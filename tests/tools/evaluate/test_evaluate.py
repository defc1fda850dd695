"""The evaluation on a random model: what a switch runs, what a cell measures, resuming, and the reports."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rich.console import Console

import tsa_compile as tsa
from tests.tools.evaluate.tiny_lm import byte_tokenizer, tiny_lm
from tsa_compile.tools import plots
from tsa_compile.tools.evaluate import report_pages, summary
from tsa_compile.tools.evaluate.anatomy import _overlap
from tsa_compile.tools.evaluate.job import Options, run
from tsa_compile.tools.evaluate.local_attention import local_attention, use_local_attention
from tsa_compile.tools.evaluate.losses import token_losses
from tsa_compile.tools.evaluate.runner import Runner
from tsa_compile.tools.evaluate.store import Store
from tsa_compile.tools.evaluate.variants import own_variant, standard_variants

SPARSE = tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8, completion=tsa.Completion(4, 2, 4))
KEEP_ALL = tsa.Plan(tsa.TokenSparse.paper(coverage=0.0, window=1, pool=1, min_tokens=1))
PLANS = (None, tsa.Plan(SPARSE), tsa.Plan(tsa.Dense(), rules=[(1, "prefill", SPARSE)]))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def ids(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(2, 250, (batch, length))


@torch.no_grad()
def transformed_logits(model, plan, x):
    if plan is None:
        return model(input_ids=x, use_cache=False).logits
    tsa.transform(model, plan)
    try:
        return model(input_ids=x, use_cache=False).logits
    finally:
        tsa.restore(model)


def test_each_plan_runs_as_transform_runs_it_and_nothing_is_traced_again():
    model, x = tiny_lm(layers=2), ids(70)
    runner = Runner(model)
    expected = [transformed_logits(model, plan, x) for plan in PLANS]
    for _ in range(2):  # the second time from the forms made the first time
        for plan, sparse, logits in zip(PLANS, (0, 2, 1), expected, strict=True):
            prefill = runner.prefill(x, plan)
            assert len(prefill.kept) == sparse
            torch.testing.assert_close(runner.logits(prefill.hidden), logits, atol=1e-4, rtol=1e-4)
    runner.prefill(ids(50, 3), PLANS[1])
    runner.prefill(x, tsa.Plan(tsa.Dense()))
    assert runner._session.report.graphs == 1
    assert sorted(runner.find_layers(x)) == [0, 1]


def test_a_second_turn_reads_the_cache_and_decode_continues_it():
    model, x, chunk = tiny_lm(layers=1), ids(40), ids(9)
    runner = Runner(model)
    first = runner.prefill(x, PLANS[0])
    second = runner.prefill(chunk, PLANS[0], first.cache)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([x, chunk], 1)).logits
    torch.testing.assert_close(runner.logits(second.hidden), whole[:, 40:], atol=1e-4, rtol=1e-4)
    losses = runner.answer_losses(second, [[5, 6, 7], [8]])
    tokens = runner.decode(second, 3)
    both = torch.cat([x, chunk], 1)
    expected = model.generate(both, attention_mask=torch.ones_like(both), max_new_tokens=3, do_sample=False)
    assert tokens == expected[:, 49:].tolist()
    with torch.no_grad():
        forced = model(input_ids=torch.cat([both, torch.tensor([[5, 6, 7], [8, 0, 0]])], 1)).logits[:, 48:].log_softmax(-1)
    assert losses[0] == pytest.approx(-sum(forced[0, i, t].item() for i, t in enumerate([5, 6, 7])) / 3, rel=1e-4)
    assert losses[1] == pytest.approx(-forced[1, 0, 8].item(), rel=1e-4)


def test_token_losses_are_the_cross_entropy():
    model, x = tiny_lm(layers=1), ids(30)
    runner = Runner(model)
    losses = token_losses(runner, runner.prefill(x, PLANS[0]).hidden, x)
    with torch.no_grad():
        assert losses.mean().item() == pytest.approx(model(input_ids=x, labels=x).loss.item(), rel=1e-4)


@pytest.mark.parametrize(("length", "window"), [(65, 16), (64, 16), (33, 32), (40, 7)])
def test_local_attention_is_attention_with_a_band(length, window):
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    mask = (distance >= 0) & (distance < window)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(local_attention(q, k, v, window, 0.3), expected, atol=1e-5, rtol=1e-5)


def tiny_gemma(window, vocabulary=90):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    rest = dict(num_key_value_heads=2, head_dim=8, sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **rest)).eval()


@pytest.mark.slow
def test_a_window_of_any_length_is_no_layer_that_can_be_sparse(tmp_path):
    model = tiny_gemma(window=300, vocabulary=258)
    use_local_attention(model)
    options = Options("m", (600,), samples=1, tasks=("text",), coverages=(0.2,), families=("paper",))
    data = run(options, model, byte_tokenizer(False), tmp_path, Console(quiet=True))
    assert data["model"]["layers"] == data["model"]["low_drift"] == [1]


def test_sliding_layers_in_blocks_change_nothing_and_stay_dense():
    model = tiny_gemma(window=16)
    x = torch.randint(2, 90, (2, 50))
    with torch.no_grad():
        expected = model(input_ids=x).logits
    use_local_attention(model)
    runner = Runner(model)
    first = runner.prefill(x[:, :40], KEEP_ALL)
    second = runner.prefill(x[:, 40:], KEEP_ALL, first.cache)
    actual = runner.logits(torch.cat([first.hidden, second.hidden], 1))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert sorted(runner.find_layers(x[:, :40])) == [1]


def test_overlap_of_lists():
    indices = torch.tensor([[0, 1, 2, -1], [0, 1, 3, -1], [4, 5, 6, -1]])
    indices = torch.cat([indices, torch.full((3, 4), -1)], 1)
    assert _overlap(indices, 3) == pytest.approx([1 / 3, 1 / 3, 0.0])


def test_variants():
    variants = standard_variants([2, 3], range(6), 6, [0.05, 0.1])
    assert len({v.name for v in variants}) == len(variants) == 8
    layers = {v.family: tuple(r.modules for r in v.plan.rules) for v in variants[1:-1]}
    assert list(layers.values()) == [(2, 3), (0, 1, 2, 3, 4, 5), (2, 3, 4)]
    assert [v.plan.rules[0].policy.completion is None for v in variants[1:3]] == [True, True]
    assert {v.family for v in standard_variants([0], [0, 1], 2, [0.1])}.isdisjoint({"completed, inner layers"})
    few = standard_variants([2, 3], range(6), 6, [0.05], ("all", "floor"))
    assert [v.family for v in few] == ["dense", "completed, all layers", "window and sinks only"]


def test_a_policy_file(tmp_path):
    good, bad = tmp_path / "mine.json", tmp_path / "bad.json"
    good.write_text(json.dumps(SPARSE.to_dict()))
    bad.write_text('{"policy": "Nonsense"}')
    assert own_variant(good).plan.prefill == SPARSE
    with pytest.raises(ValueError, match=r"bad.json: unknown policy 'Nonsense'"):
        own_variant(bad)


def test_a_store_goes_on_only_with_the_same_setting(tmp_path):
    path = tmp_path / "results.json"
    Store(path, {"model": "a", "samples": 2}).add(100, "text", "dense", {"kl": [0.0]})
    again = Store(path, {"model": "a", "samples": 2})
    assert again.has(100, "text", "dense")
    assert not again.has(100, "text", "other")
    with pytest.raises(ValueError, match=r"results of another evaluation \(differing: samples\)"):
        Store(path, {"model": "a", "samples": 3})


def test_options_are_checked():
    with pytest.raises(ValueError, match="unknown task 'poetry'; known: text, inside, needle,"):
        Options("m", (1400,), tasks=("poetry",))
    with pytest.raises(ValueError, match="unknown family 'mine'; known: paper, all, inner, floor"):
        Options("m", (1400,), families=("mine",))
    with pytest.raises(ValueError, match="lengths must be 256 tokens or more"):
        Options("m", (100,))
    with pytest.raises(ValueError, match="lengths go up to 9000, but the model has 4096 positions"):
        run(Options("m", (9000,)), tiny_lm(), byte_tokenizer(True), "unused", Console())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(folder, results) of two tasks; the first run is cut, the second goes on."""
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    model, tokenizer = tiny_lm(), byte_tokenizer(True)
    setting = dict(samples=2, coverages=(0.2,), batch_tokens=6000)
    first = run(Options("tiny", (1400,), tasks=("text",), **setting), model, tokenizer, folder, Console(quiet=True))
    before = [c["elapsed"] for c in first["cells"]]
    data = run(
        Options("tiny", (1400,), tasks=("text", "inside", "multi_turn"), **setting), model, tokenizer, folder, Console(quiet=True)
    )
    assert [c["elapsed"] for c in data["cells"][: len(before)]] == before  # not measured again
    return folder, data


def test_every_cell_is_measured_and_written(evaluated):
    folder, data = evaluated
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(data))
    assert len(data["variants"]) == 5
    assert len(data["cells"]) == 5 * 3  # text, inside, multi_turn
    found = {r.variant: r for r in summary.rows(data)}
    dense, completed = found["dense"], found["completed, all layers, tau 0.2"]
    assert dense.kl == pytest.approx(0, abs=1e-6)
    assert (dense.sparsity, dense.speedup) == (0, 1)
    assert 0 < completed.sparsity < 0.25  # 1152 of 1400 tokens are always kept
    assert completed.kl > 0
    assert 200 < completed.perplexity < 300  # a random model over 258 ids
    assert math.isfinite(completed.answer_nll)
    assert found["window and sinks only"].sparsity > 0.8
    inside = summary.cell(data, 1400, "inside", completed.variant)
    assert set(inside["overlap"]) == {"0", "1", "2", "3"}
    assert inside["time"]["select"] > 0
    assert inside["time"]["dense attention"] == 0


def test_reports(evaluated):
    _, data = evaluated
    table = report_pages.markdown(data)
    assert table.count("\n| ") == 2 + 5
    assert "| dense | 0% |" in table
    assert "| needle |" not in table  # not measured
    page = report_pages.page(data)
    assert page.count("<svg") >= 7
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_plots_take_any_numbers():
    assert "nothing measured" in plots.curves({"a": []}, "x", "y")
    plot = plots.curves({"a": [(0.0, 0.0, "zero"), (0.5, 1e-4, "half <")]}, "x", "y", y="log10")
    assert plot.count("<circle") == 1  # no zero on a logarithmic axis
    assert "half &lt;" in plot
    doubled = plots.curves({"a": [(4096, 0.9, ""), (131072, 4.0, "")]}, "tokens", "speed-up", "log2", "log2")
    assert all(f">{tick}<" in doubled for tick in (4096, 8192, 131072, 0.5, 1, 2, 4))
    assert plots.curves({"a": [(0.1, 0.0, "")]}, "x", "y").count("<circle") == 1
    assert plots.heat_map(["r"], ["c", "d"], [[0.5, None]], "label").count("<rect") == 2
