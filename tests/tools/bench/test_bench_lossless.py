"""The check of speculation's contract: on a tiny model it holds, a second call goes on, and what breaks it is found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.cache.models import tiny
from tests.tools.bench.test_bench_speculation import Bytes
from tsa_compile.generate import rounds
from tsa_compile.learn.state import Measured
from tsa_compile.session import attached
from tsa_compile.tools.bench import lossless
from tsa_compile.tools.bench.lossless_contract import Divergence, row_of, told

pytest.importorskip("transformers")

FEW = lossless.Setting(prompts=3, batch=2, shortest=20, longest=40, new=8, gamma=3, keys=4)


def run(model, state, drafts=("pages",)):
    done = []
    rows = [*lossless.measure(model, Bytes(), FEW, drafts, state, lambda: done.append(0))]
    assert len(done) == (2 + len(drafts)) * FEW.batches
    assert attached(model) is None
    return rows


@pytest.mark.slow
def test_a_tiny_model_holds_it_and_a_second_call_goes_on(tmp_path, monkeypatch):
    model, path = tiny("llama", layers=1), tmp_path / "state.json"
    exact, pages = rows = run(model, Measured(path, dataclasses.asdict(FEW)))
    assert [(r.draft, r.prompts, r.equal, r.held) for r in rows] == [("exact", 3, 3, True), ("pages", 3, 3, True)]
    assert (exact.tokens_a_verify, exact.sparse) == (0, (0, 0))
    assert 1 <= pages.tokens_a_verify < 4
    assert pages.sparse == (1, 1)
    assert "float32, pages: contract held; 3 of 3 prompts" in told(pages)
    monkeypatch.setattr(lossless, "_generate", None)  # nothing is run again
    assert run(model, Measured(path, dataclasses.asdict(FEW))) == rows


@pytest.mark.slow
def test_an_accept_rule_that_keeps_too_much_is_found(monkeypatch):
    real = rounds.accept_greedy
    monkeypatch.setattr(rounds, "accept_greedy", lambda drafted, scores: real(drafted, scores.roll(1, -1)))
    exact, pages = run(tiny("llama", layers=1), Measured(None, {}))
    assert exact.held
    assert not pages.held
    assert "BROKEN" in told(pages)


def batches(*tokens, gaps=((5.0, 5.0, 0.05), (5.0, 0.3, 5.0))):
    return [{"tokens": [row], "gaps": [gap]} for row, gap in zip(tokens, gaps, strict=True)]


def test_what_the_contract_allows():
    exact = batches([1, 2, 3], [4, 5, 6])
    for got, float32, bfloat16 in (
        (batches([1, 2, 3], [4, 5, 6]), True, True),
        (batches([1, 2, 9], [4, 5, 6]), False, True),  # the logits were near
        (batches([1, 2, 9], [4, 9, 9]), False, False),
    ):
        assert row_of("float32", "pages", exact, got, exact).held is float32
        assert row_of("bfloat16", "pages", exact, got, exact).held is bfloat16
        assert row_of("float32", "exact", exact, got, exact).held is float32
        assert row_of("bfloat16", "exact", exact, got, exact).held  # of the untouched model, in half precision, nothing is asked
    found = row_of("bfloat16", "pages", exact, got, exact)
    assert found.divergences == (Divergence(0, 2, 3, 9, 0.05), Divergence(1, 1, 5, 9, 0.3))
    assert (found.prompts, found.equal) == (2, 0)


def test_prompts_differ_in_length_and_fill_batches():
    found = lossless.prompts(Bytes(), lossless.Setting(prompts=23, batch=4, shortest=5, longest=16))
    assert [len(ids) for ids, _ in found] == [4] * 5 + [3]
    lengths = torch.cat([mask.sum(1) for _, mask in found])
    assert set(lengths.tolist()) == set(range(5, 17))
    with pytest.raises(ValueError, match="shortest <= longest"):
        lossless.Setting(shortest=9, longest=8)
    with pytest.raises(ValueError, match=r"drafts must be of \['verify', 'layer', 'pages', 'window', 'lookup'\], got suffix"):
        next(lossless.measure(None, Bytes(), FEW, ["suffix"], Measured(None, {})))
