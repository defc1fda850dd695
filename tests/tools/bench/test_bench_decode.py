"""The decode benchmark: its bytes, its checks, and that every form runs (on the references, without a GPU's clock)."""

import dataclasses

import pytest
import torch

from tsa_compile.tools.bench import decode, select_variants
from tsa_compile.tools.bench.decode_cases import CASES, ROUND_BYTES, Buffers, DecodeCase

SMALL = DecodeCase(2, 512, heads=4, kv_heads=2, dim=16, keep=0.25)


def test_bytes_and_floors_of_the_issue():
    case = next(c for c in CASES if c.name == "B8 L128K")
    assert case.kv_bytes == 2 * 8 * 8 * 131072 * 128 * 2
    assert case.index_bytes == 8 * 8 * 8192 * 128 * 2
    assert case.kept_pages == 410
    floors = case.floors(4.27)
    assert floors["pages"] == pytest.approx(0.082, abs=1e-3)
    assert floors["attend"] == pytest.approx(0.050, abs=1e-3)
    for case in CASES:
        assert case.sets * (case.kept_bytes if case.rows == 1 else case.kv_bytes) >= ROUND_BYTES


@pytest.mark.parametrize("rows", [1, 3])
def test_every_form_runs_and_is_right(monkeypatch, rows):
    case = dataclasses.replace(SMALL, rows=rows)
    monkeypatch.setattr(DecodeCase, "sets", 2)
    monkeypatch.setattr(decode, "graph_ms", lambda work, repeats: float(len(work())))
    row = decode.bench_decode(case, 4.0, device="cpu")
    assert set(row.times.values()) == {1.0}
    assert {"SDPA", "exact", "exact, key mask"} <= set(row.times)
    assert ("pages" in row.times) == (rows == 1)
    assert max(row.errors.values()) < decode.TOLERANCE
    assert any("pages" in line for line in decode.told(row)) == (rows == 1)


def test_nothing_is_timed_after_a_wrong_result():
    x = Buffers.random(SMALL, "cpu")
    assert max(decode.check(SMALL, x).values()) < decode.TOLERANCE
    with pytest.raises(RuntimeError, match="B2 L0K: relative error above"):
        decode.check(SMALL, dataclasses.replace(x, v=x.v.masked_fill(torch.arange(16) == 3, torch.nan)))


def test_variants_of_the_lists_are_compared_before_they_are_timed(monkeypatch):
    """Each through Triton's interpreter; one that makes other lists is told."""
    pytest.importorskip("triton")
    monkeypatch.setattr(decode, "graph_ms", lambda work, repeats: float(len(work())))
    monkeypatch.setattr(select_variants, "VARIANTS", select_variants.VARIANTS[:1])
    monkeypatch.setattr(select_variants, "EARLY", ())
    buffers = [Buffers.random(SMALL, "cpu")]
    assert len(decode.run_sweep(SMALL, buffers, "select", 1)) == 2
    wrong = {"wrong": lambda x, scores: tuple(t + 1 for t in decode.select(SMALL, x, scores))}
    monkeypatch.setattr(decode, "select_variants", lambda case: wrong)
    with pytest.raises(RuntimeError, match=r"100\.0% of the pages of variant 'wrong' are others"):
        decode.run_sweep(SMALL, buffers, "select", 1)
