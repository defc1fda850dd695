"""The decode benchmark: its bytes, its checks, and that every form runs (on the references, without a GPU's clock)."""

import dataclasses

import pytest
import torch

from tsa_compile.tools.bench import decode, index_forms, select_variants
from tsa_compile.tools.bench.decode_cases import CASES, ROUND_BYTES, Buffers, DecodeCase
from tsa_compile.tools.bench.decode_forms import page_forms
from tsa_compile.tools.bench.index_variants import index_variants
from tsa_compile.tools.bench.sampled_variants import sampled_variants

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


def test_other_indexes_read_as_many_pages():
    x = Buffers.random(SMALL, "cpu")
    forms = index_forms.index_forms(SMALL, [x])
    means, basis, completed = (f(x) for f in (page_forms(SMALL, [x])["pages"], forms["pages, basis"], forms["pages, completed"]))
    assert means[0].shape == basis[0].shape == completed[0].shape
    assert (completed[1] > means[1]).all()  # unread pages add to the sum of exponentials
    torch.testing.assert_close(completed, forms["complete"](x))
    refined, logits = (
        forms["refine"](x)[0],
        torch.ops.tsa.page_scores(x.q, x.sums, x.counts, None, 1, None, x.lengths, 512, 0.25)[0],
    )
    changed = (refined != logits).float().mean(-1)
    assert (changed > 0.2).all()
    assert (changed < 0.3).all()  # a fifth of 32 pages, and the last
    case = next(c for c in CASES if c.name == "B8 L128K")
    assert index_forms.index_floors(case)["pages, basis"] / 4.27e9 == pytest.approx(0.098, abs=1e-3)


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
    monkeypatch.setattr(select_variants, "LATE", ())
    buffers = [Buffers.random(SMALL, "cpu")]
    assert len(decode.run_sweep(SMALL, buffers, "select", 1)) == 2
    wrong = {"wrong": lambda x, scores: tuple(t + 1 for t in decode.select(SMALL, x, scores))}
    monkeypatch.setattr(decode, "select_variants", lambda case: wrong)
    with pytest.raises(RuntimeError, match=r"100\.0% of the pages of variant 'wrong' are others"):
        decode.run_sweep(SMALL, buffers, "select", 1)


def test_variants_of_the_indexes_give_the_operators_results():
    """Each variant that is timed, through Triton's interpreter."""
    pytest.importorskip("triton")
    x = Buffers.random(SMALL, "cpu")
    x = dataclasses.replace(x, **{name: getattr(x, name).float() for name in ("q", "k", "v", "sums")})
    for which in ("score", "refine", "complete"):
        found = [form(x) for form in index_variants(SMALL, [x], which).values()]
        assert len(found) > 5
        for got in found[1:]:
            torch.testing.assert_close(got, found[0], rtol=1e-4, atol=1e-4)


def test_variants_of_sampled_values_draw_the_same():
    """Some of those that are timed, through Triton's interpreter; here with more keys than samples."""
    pytest.importorskip("triton")
    case = dataclasses.replace(SMALL, length=300, batch=1)
    x = Buffers.random(case, "cpu")
    x = dataclasses.replace(x, **{name: getattr(x, name).float() for name in ("q", "k", "v", "sums")})
    found = list(sampled_variants(case).items())
    got = [form(x) for name, form in found[::5] if name.startswith("prop")]
    assert len(got) == 3
    for other in got[1:]:
        torch.testing.assert_close(other, got[0], rtol=1e-4, atol=1e-4)
