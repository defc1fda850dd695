"""The measurements of speculation run on a tiny model: acceptance behind real texts, and what the steps cost."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import tiny
from tsa_compile.session import attached
from tsa_compile.steps import FIXED
from tsa_compile.tools.bench import acceptance, round_costs

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
@pytest.mark.parametrize("batch", [1, 2])
def test_costs_of_a_round(batch):
    model = tiny("llama", layers=1)
    measured = round_costs.measure_round(model, tsa.Remembered("verify", keys=8, share=0.1), batch, 60, 3, repeats=2)
    assert measured.steps == {FIXED: 15}  # three kinds, three times to warm up and two to be timed
    assert (measured.cost.batch, measured.cost.length) == (batch, 60)
    assert measured.cost.draft > 0
    assert measured.exact_ms > 0
    assert round_costs.measure_round(model, "lookup", batch, 60, 3, repeats=1).cost.draft == 0
