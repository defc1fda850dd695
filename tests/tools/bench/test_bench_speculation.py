"""The measurements of speculation run on a tiny model: acceptance behind real texts, and what the steps cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

import tsa_compile as tsa
from tests.cache.models import tiny
from tsa_compile.generate import draft_table
from tsa_compile.policies.base import from_dict
from tsa_compile.session import attached
from tsa_compile.tools.bench import acceptance, forced_rounds, output, round_cli
from tsa_compile.tools.bench.bench_cli import bench
from tsa_compile.tools.load_models import load_causal_lm

pytest.importorskip("transformers")


class Bytes:
    """A tokenizer: some bytes of the text."""

    def __call__(self, text, return_tensors):
        self.input_ids = torch.tensor([[2 + ord(c) % 120 for c in text]])
        return self


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
def test_acceptance(sampled):
    model = tiny("llama", layers=1)
    rows = [*acceptance.measure(model, Bytes(), ["window", "lookup"], [300], 12, 3, 0.07, sampled)]
    assert [(r.draft, r.text) for r in rows] == [(d, t) for d in ("window", "lookup") for t in ("prose", "code")]
    assert {r.equal for r in rows} == {None if sampled else True}
    assert all(1 <= r.tokens_a_verify <= 4 for r in rows if r.tokens_a_verify)
    assert attached(model) is None


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "draft"), [(1, "verify"), (2, "verify"), (2, "pages")])
def test_rounds_at_an_acceptance_that_is_given(batch, draft):
    """On a CPU, whose times say nothing: everything is measured, drafts are sparse, and the gate switches off."""
    torch.manual_seed(0)
    model = tiny("llama", layers=1)
    case = forced_rounds.RoundCase(batch, 300, 3, 2.5, rounds=40, repeats=2, gated=30)
    exact = forced_rounds.measure_exact(model, case)
    made = {"verify": tsa.Remembered("verify", keys=8, ratio=0.1), "pages": tsa.PageSparse(pages=4)}[draft]
    row = forced_rounds.measure_rounds(model, case, draft, made, exact)
    assert row.at_once
    assert row.sparse == (1, 1)
    assert abs(row.t - 2.5) < 0.5
    assert row.bound == row.t / (3 * row.c + row.v)
    assert min(row.c, row.v, row.speedup, row.of_bound, row.gate, *row.tokens_per_second) > 0
    assert "switched off" in row.gate_note
    assert attached(model) is None
    assert "of the bound" in forced_rounds.told(row)


def test_what_is_timed_is_kept_by_the_models_own_acceptance(tmp_path):
    """Tokens of a round by acceptance by place, in the mean over texts; then the row of the table that drafts are chosen by."""
    rows = [
        acceptance.Acceptance("pages", text, length, 0.07, 3, 9, 2.0, places, None)
        for length, text, places in ((300, "prose", (1.0, 0.5, 0.0)), (300, "code", (0.5,)), (3000, "code", (1.0, 1.0, 1.0)))
    ]
    output.write_json(str(tmp_path / "a.json"), rows)
    assert acceptance.read(str(tmp_path / "a.json")) == [dataclasses.replace(r, acceptance=[*r.acceptance]) for r in rows]
    for length, gamma, tokens in ((400, 3, 2.0), (400, 1, 1.75), (2000, 3, 4.0)):
        assert acceptance.tokens_a_round(rows, "pages", length, gamma, 0.07) == tokens
    for name, gamma in (("window", 3), ("pages", 4)):
        with pytest.raises(ValueError, match=rf"no acceptance of {name}, share 0\.07, gamma {gamma} or more"):
            acceptance.tokens_a_round(rows, name, 400, gamma, 0.07)
    case = forced_rounds.RoundCase(2, 300, 3, 2.0)
    took = dict(draft_ms=1.0, verify_ms=2.0, round_ms=6.0, exact=forced_rounds.ExactTimes(3.0, 4.0), case=case, draft="pages")
    others = {f.name: 0 for f in dataclasses.fields(forced_rounds.RoundRow)}
    made = tsa.PageSparse(pages=4)
    timing = forced_rounds.timing_of(forced_rounds.RoundRow(**{**others, **took}), tiny("llama", layers=1), made, "eager")
    assert timing.tokens_per_second == pytest.approx(2 * 2.0 / 6e-3)
    assert (timing.device, timing.gamma, timing.exact_ms, from_dict(dict(timing.policy))) == ("cpu", 3, 4.0, made)


@pytest.mark.slow
def test_from_the_commands_to_a_request(tmp_path, monkeypatch):
    """`bench round --acceptance` writes the table by which draft="measured" chooses."""
    monkeypatch.setenv("TSA_DRAFTS", str(tmp_path / "drafts.json"))
    tiny("llama", layers=1).save_pretrained(tmp_path / "model")
    places = dict(share=0.07, gamma=3, new=9, tokens_a_verify=2.0, equal=None)
    rows = [
        acceptance.Acceptance(draft, "code", 300, acceptance=(x,) * 3, **places) for draft, x in (("pages", 0.9), ("window", 0.0))
    ]
    output.write_json(str(tmp_path / "a.json"), rows)
    command = [
        "round",
        str(tmp_path / "model"),
        "--cases",
        "1x300",
        "--drafts",
        "window,pages",
        "--gamma",
        "2,3",
        "--rounds",
        "4",
    ]
    result = CliRunner().invoke(bench, [*command, "--acceptance", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    table = draft_table.read(tmp_path / "drafts.json")
    assert [(r.draft, r.gamma, r.given) for r in table] == [
        ("window", 2, 1.0), ("pages", 2, pytest.approx(2.71)), ("window", 3, 1.0), ("pages", 3, pytest.approx(3.439)),
    ]  # fmt: skip
    model = load_causal_lm(str(tmp_path / "model"))
    tsa.generate(
        model, torch.arange(2, 42)[None], max_new_tokens=6, do_sample=False, draft="measured", costs=[(1, 300, 0.0, 0.5)]
    )
    best = max(table, key=lambda row: row.tokens_per_second)
    assert f"by measurement: {best}" in tsa.report(model).speculation.notes


def test_rounds_of_lookup_are_refused():
    with pytest.raises(ValueError, match="got 'lookup': rounds are timed behind random tokens"):
        round_cli.bench_round("smollm2", drafts="verify,lookup", gamma="6", cases="1x64", acceptance=None)


@pytest.mark.parametrize("given", [1.0, 1.5, 4.0, 6.9, 7.0])
def test_the_coin_gives_so_many_tokens(given):
    bias = forced_rounds.RoundCase(1, 100, 6, given).bias
    assert abs(sum(bias**n for n in range(7)) - given) < 1e-9
    with pytest.raises(ValueError, match="given must be tokens of a round"):
        forced_rounds.RoundCase(1, 100, 6, 7.1)
