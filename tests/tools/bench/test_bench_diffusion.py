"""The benchmark of denoising steps: its checks, its sums, and that every form runs (on the references, without a GPU's clock)."""

from __future__ import annotations

import pytest
import torch

from tsa_compile.tools.bench import diffusion
from tsa_compile.tools.bench.diffusion_cases import CASES, DiffusionCase, DiffusionRow, told
from tsa_compile.tools.diffusion.model import BlockLM

SMALL = DiffusionCase(2, 96, 8, 16, 4, heads=4, kv_heads=2, dim=16, layers=3, dense_layers=1, mlp=32, vocabulary=50)


def test_every_form_runs_and_is_right(monkeypatch):
    phases = []

    def clock(work, repeats):
        work()
        return 1.0

    begin = diffusion.BlockCache.begin

    def noted(self, phase, rows):
        phases.append(phase)
        begin(self, phase, rows)

    monkeypatch.setattr(diffusion, "graph_ms", clock)
    monkeypatch.setattr(diffusion.BlockCache, "begin", noted)
    row = diffusion.bench_diffusion(SMALL, BlockLM(SMALL.sizes).eval(), device="cpu")
    assert row.attention == {name: 0.5 for name in ("dense", "select", "first", "later")}  # of two layers' round
    assert row.model == {"dense": 1.0, "first": 1.0, "later": 1.0}
    assert phases == ["denoise_first"] * 3 + ["denoise"]
    assert row.error < 1e-5
    assert row.held == pytest.approx(1)
    assert any("model, ms a call" in line for line in told(row))
    assert diffusion.bench_diffusion(SMALL, None, device="cpu").model == {}


def test_sums_of_a_block():
    attention = {"dense": 10.0, "select": 4.0, "first": 14.0, "later": 1.0}
    row = DiffusionRow(SMALL, attention, {"dense": 50.0, "first": 60.0, "later": 20.0}, 0.0, 1.0)
    assert row.later_over_dense == 10
    assert row.block_attention == (3 * 4 * 10, 2 * (14 + 3) + 4 * 10)
    assert row.block_model == (5 * 50, 60 + 3 * 20 + 50)


def test_nothing_is_timed_after_a_wrong_result():
    x = diffusion._buffers(SMALL, "cpu", torch.float32)
    assert diffusion.check(SMALL, x)[0] < 1e-5
    with pytest.raises(RuntimeError, match="nothing is timed"):
        diffusion.check(SMALL, x._replace(v=x.v.masked_fill(torch.arange(16) == 3, torch.nan)))


def test_cases_are_of_llama_8b():
    assert {c.prefix for c in CASES} == {16384, 32768, 65536, 131072}
    with torch.device("meta"):
        assert sum(p.numel() for p in BlockLM(CASES[0].sizes).parameters()) == 8_030_261_248
