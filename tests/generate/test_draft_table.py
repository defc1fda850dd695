"""draft="measured": the fastest draft by the table of this machine, the gate with it, and an error where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import tiny, token_ids
from tsa_compile.generate.draft_table import DraftTiming, best, read, shape_of, table_file, write
from tsa_compile.generate.payoff import Cost
from tsa_compile.session import attached

pytest.importorskip("transformers")

FEW = tsa.PageSparse(pages=2, sinks=0, recent=1)
WINDOW = tsa.PageSparse(pages=3, sinks=1, recent=2)


@pytest.fixture(scope="module")
def model():
    torch._dynamo.reset()
    return tsa.transform(tiny("llama", layers=1), tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The file, which is not there yet."""
    monkeypatch.setenv("TSA_DRAFTS", str(tmp_path / "folder" / "drafts.json"))
    return table_file()


@pytest.fixture
def rows(model):
    """At 1 x 64 tokens pages with gamma 3 are fastest; at 4 x 64 a window."""
    pages = DraftTiming("cpu", shape_of(model), "eager", 1, 64, "pages", FEW.to_dict(), 3, 3.0, 1.0, 2.0, 6.0, 4.0)
    window = dataclasses.replace(pages, draft="window", policy=WINDOW.to_dict(), given=2.0)
    return [
        pages,
        dataclasses.replace(pages, gamma=5, given=3.5, round_ms=8.0),
        window,
        dataclasses.replace(pages, batch=4, round_ms=12.0),
        dataclasses.replace(window, batch=4, round_ms=5.0),
        dataclasses.replace(pages, device="another GPU", given=3.9),
        dataclasses.replace(pages, compiler="inductor", given=3.9),
        dataclasses.replace(pages, model="another model", given=3.9),
    ]


def test_the_most_tokens_a_second_where_it_was_measured_nearest(model, table, rows):
    write(rows, table)
    assert best(model, "eager", 1, 90) == (rows[0], (rows[0].cost, rows[3].cost))
    assert best(model, "eager", 1, 90, gamma=5)[0] == rows[1]
    assert best(model, "eager", 6, 10)[0] == rows[4]
    with pytest.raises(ValueError, match=r"gamma 4\) on cpu; measure with `tsa-compile bench acceptance MODEL"):
        best(model, "eager", 1, 90, gamma=4)


def test_the_gates_line_takes_what_whole_rounds_took(rows):
    """A round of 6 ms, where three draft steps and a verify step alone take 5, and a token of exact decoding 4."""
    cost = rows[0].cost
    assert (cost.batch, cost.length, cost.given) == (1, 64, 3.0)
    assert 3 * cost.draft + cost.verify == pytest.approx(6 / 4)
    assert cost.verify == pytest.approx(2 * cost.draft)
    assert rows[0].tokens_per_second == 500


def test_newer_rows_replace_older_ones(table, rows):
    assert read(table) == []
    write(rows[:2], table)
    newer = dataclasses.replace(rows[1], round_ms=1.0)
    write([newer], table)
    assert read(table) == [rows[0], newer]
    table.write_text('[{"draft": 1}]')
    with pytest.raises(ValueError, match=r"drafts\.json is no table of drafts"):
        read(table)


def generated(model, **how):
    """(new tokens, what speculation came to)."""
    attached(model).speculation = None
    tokens = tsa.generate(model, token_ids(40), max_new_tokens=12, do_sample=False, **how)
    return tokens, attached(model).speculation


def test_a_request_by_the_table(model, table, rows):
    """The report says what was chosen. A draft that lost against exact decoding is not begun; the caller's costs come first."""
    want = tiny("llama", layers=1).generate(token_ids(40), max_new_tokens=12, do_sample=False)
    write(rows[:3], table)
    got, seen = generated(model, draft="measured")
    assert torch.equal(got, want)
    assert (seen.draft_sites, seen.sparse_sites) == (1, 1)
    assert (
        next(iter(seen.notes)) == "by measurement: pages, gamma 3: 500.0 tokens/s, exact decoding 250.0, at 1 x 64 tokens on cpu"
    )
    write([dataclasses.replace(row, round_ms=16.0) for row in rows[:3]], table)
    got, seen = generated(model, draft="measured")
    assert torch.equal(got, want)
    assert seen.draft_steps == 0
    assert any("gave 3.50 tokens when it was measured" in note for note in seen.notes)
    assert generated(model, draft="measured", costs=[Cost(1, 64, 0.0, 0.5)])[1].draft_steps > 0


def test_without_a_table_it_is_an_error(model, table):
    with pytest.raises(ValueError, match=r"drafts\.json has no rounds of this model \(llama, 1 layers, 4/2 heads"):
        generated(model, draft="measured")
    with pytest.raises(ValueError, match="gamma must be an int from 1 to 15, got 16"):
        tsa.speculative("measured", 16)
