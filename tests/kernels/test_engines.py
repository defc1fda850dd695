"""The engine that `auto` takes: by the measured table, and only if it can run."""

from __future__ import annotations

import json

import pytest
import torch

from tsa_compile.kernels.attend.tokens import engines


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the tuned table; the GPU is said to be of capability 9.0."""
    monkeypatch.setenv("TSA_TUNED", str(tmp_path / "engines.json"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def write(content):
        (tmp_path / "engines.json").write_text(json.dumps(content))
        engines.measured_table.cache_clear()

    yield write
    monkeypatch.undo()
    engines.measured_table.cache_clear()


def runs(monkeypatch, reason=None):
    monkeypatch.setattr(engines, "INNER", (engines.InnerEngine("stub", lambda q, v: reason, None),))


def qkv(length, queries=None, dim=128):
    q = torch.empty(1, 4, queries or length, dim, device="meta")
    return q, *(torch.empty(1, 2, length, dim, device="meta") for _ in range(2))


def test_packed_from_the_measured_length_on(table, monkeypatch):
    runs(monkeypatch)
    table({"9.0": {"128": 1000}})
    assert engines.choose(*qkv(999)) == "fused"
    assert engines.choose(*qkv(1000)) == "packed"


def test_fused_where_packed_cannot_run(table, monkeypatch):
    table({"9.0": {"128": 1000}})
    runs(monkeypatch, "not installed")
    assert engines.choose(*qkv(2000)) == "fused"
    runs(monkeypatch)
    assert engines.choose(*qkv(2000, queries=100)) == "fused"  # a chunk: heads keep different numbers of queries


def test_fused_where_nothing_was_measured(table, monkeypatch):
    runs(monkeypatch)
    table({"9.0": {"128": None}, "8.0": {"64": 1}})
    assert engines.choose(*qkv(1 << 20)) == "fused"
    assert engines.choose(*qkv(1 << 20, dim=80)) == "fused"


def test_the_shipped_table_is_read_and_tuning_goes_over_it(table):
    shipped = json.loads(engines.SHIPPED.read_text())
    table({"8.0": {"64": 7}})
    assert engines.measured_table() == {**shipped, "8.0": {"64": 7}}
