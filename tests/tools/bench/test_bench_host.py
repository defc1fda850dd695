"""The benchmark of host time: every form runs (on the references, without a GPU's clock), and its table."""

import json

import pytest
import torch
from typer.testing import CliRunner

from tsa_compile.tools.bench import host_time, timing
from tsa_compile.tools.bench.bench_cli import bench
from tsa_compile.tools.bench.host_cli import bench_host
from tsa_compile.tools.bench.host_time import HostRow


def test_every_form_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in {"CALLS": 1, "ROUNDS": 1, "HEADS": 4, "KV_HEADS": 2, "DIM": 16}.items():
        monkeypatch.setattr(host_time, name, value)
    rows = list(host_time.bench_host([96, 160], "cpu"))
    assert all(0 < row.host <= row.call for row in rows)
    forms = {row.form for row in rows}
    assert {"SDPA", "BlockSparse", "TokenSparse", "decode, exact", "decode, pages"} <= forms
    assert len(rows) == 2 * len(forms)


def test_the_table_has_forms_by_lengths():
    table = host_time.table([HostRow("SDPA", 512, 10.2, 20.0), HostRow("SDPA", 1024, 11.0, 30.0), HostRow("x", 512, 1.0, 2.0)])
    assert [str(column.header) for column in table.columns] == ["form", "512", "1,024"]
    assert [list(column.cells) for column in table.columns] == [["SDPA", "x"], ["10 (20)", "1 (2)"], ["11 (30)", ""]]


def test_each_row_is_printed_and_written_as_it_is_there(monkeypatch, tmp_path, capsys):
    path = tmp_path / "host.json"

    def rows(lengths):
        for number, length in enumerate(lengths):
            assert number == (len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
            assert capsys.readouterr().out.count("tokens: 10 us (in a row of calls 20)") == min(number, 1)
            yield HostRow("SDPA", length, 10.0, 20.0)

    monkeypatch.setattr(host_time, "bench_host", rows)
    monkeypatch.setattr(timing, "environment", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench_host("512,1024,2048", str(path))
    assert [row["length"] for row in json.loads(path.read_text())["rows"]] == [512, 1024, 2048]
    assert "host time of a call" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed():
    result = CliRunner().invoke(bench, ["host"])
    assert "the benchmarks time a GPU" in str(result.exception)
