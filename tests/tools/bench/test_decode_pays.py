"""`tsa-compile tune`'s decode rows: both sides compute the same, and what is timed becomes a row (without a GPU's clock)."""

import functools

import pytest
import torch
from typer.testing import CliRunner

from tsa_compile import pays
from tsa_compile.frontends.cli import app
from tsa_compile.tools.bench import decode_pays, timing
from tsa_compile.tools.bench.decode_pays import StepSize

SIZE = StepSize(2, 4, 2, 16, 40, "cpu")


def by_position(size, heads, rows):
    """Rows that are told by their place."""
    wave = torch.arange(rows)[:, None].mul(0.7).sin() + torch.arange(size.dim).mul(0.3).cos()
    return wave.expand(size.batch, heads, rows, size.dim).bfloat16().clone()


def test_both_sides_compute_the_same(monkeypatch):
    monkeypatch.setattr(StepSize, "random", by_position)
    monkeypatch.setattr(StepSize, "layers", 2)
    both = [list(side(SIZE)()) for side in (decode_pays.dense, decode_pays.exact)]
    assert [x.shape for side in both for x in side] == [(2, 4, 1, 16)] * 4
    torch.testing.assert_close(*both, rtol=2e-2, atol=2e-2)


def test_a_round_is_larger_than_a_cache_and_no_longer_than_a_model():
    assert StepSize(1, 32, 8, 128, 131072).layers == 1
    assert StepSize(1, 32, 8, 128, 4096).layers == 16
    assert StepSize(1, 12, 2, 64, 256).layers == 32


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A GPU on which `Exact` is slower at 16 tokens and faster at 64, and that has no memory for more."""
    monkeypatch.setenv("TSA_PAYS", str(tmp_path / "pays.json"))
    monkeypatch.setattr(timing, "check_gpu", lambda: None)
    monkeypatch.setattr(pays, "capability", lambda device: "9.9")
    monkeypatch.setattr(decode_pays, "capability", lambda device: "9.9")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 0))
    monkeypatch.setattr(decode_pays, "StepSize", functools.partial(StepSize, device="cpu"))
    monkeypatch.setattr(StepSize, "layers", 1)
    monkeypatch.setattr(decode_pays, "LENGTHS", (16, 64, 1 << 20))
    monkeypatch.setattr(decode_pays, "SHAPES", ((4, 2),))
    times = iter([1.0, 2.0, 4.0, 3.0] * 2)  # dense, exact at 16; dense, exact at 64
    monkeypatch.setattr(decode_pays, "graph_ms", lambda work: work() or next(times))
    yield tmp_path / "pays.json"
    pays.table.cache_clear()


def test_tune_keeps_them(fake):
    ran = CliRunner().invoke(app, ["tune", "--only", "decode", "--head-dims", "16"])
    assert ran.exit_code == 0, ran.output
    rows = pays.read(fake)
    assert [(row.policy, row.batch, row.lengths, row.pays_from) for row in rows] == [
        ("Exact", 1, (16, 64), 64),
        ("Exact", 8, (16, 64), 64),
    ]
    assert (rows[0].dense_ms, rows[0].sparse_ms) == ((1.0, 4.0), (2.0, 3.0))
    assert pays.measured_from("Exact", torch.device("cuda"), 16, 4, 2) == 64


def test_an_unknown_part():
    ran = CliRunner().invoke(app, ["tune", "--only", "decoding"])
    assert ran.exit_code == 2
    assert "packed, prefill, decode" in ran.output
