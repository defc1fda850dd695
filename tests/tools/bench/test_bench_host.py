"""The benchmark of host time: every form runs (on the references, without a GPU's clock), and its table."""

import pytest
import torch
from typer.testing import CliRunner

from tsa_compile.tools.bench import host_time
from tsa_compile.tools.bench.bench_cli import bench
from tsa_compile.tools.bench.host_time import HostRow


def test_every_form_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in {"CALLS": 1, "ROUNDS": 1, "HEADS": 4, "KV_HEADS": 2, "DIM": 16}.items():
        monkeypatch.setattr(host_time, name, value)
    told = []
    rows = host_time.bench_host([96, 160], told.append, "cpu")
    assert rows == told
    assert all(0 < row.host <= row.call for row in rows)
    forms = {row.form for row in rows}
    assert {"SDPA", "BlockSparse", "TokenSparse", "decode, exact", "decode, pages"} <= forms
    assert len(rows) == 2 * len(forms)


def test_the_table_has_forms_by_lengths():
    table = host_time.table([HostRow("SDPA", 512, 10.2, 20.0), HostRow("SDPA", 1024, 11.0, 30.0), HostRow("x", 512, 1.0, 2.0)])
    assert [str(column.header) for column in table.columns] == ["form", "512", "1,024"]
    assert [list(column.cells) for column in table.columns] == [["SDPA", "x"], ["10 (20)", "1 (2)"], ["11 (30)", ""]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed():
    result = CliRunner().invoke(bench, ["host"])
    assert "the benchmarks time a GPU" in str(result.exception)
