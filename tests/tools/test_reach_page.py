"""The page of `tsa-compile reach`: the curves have the corners that the proof has, and the command writes it."""

from __future__ import annotations

import json

from tests.api.tiny import tiny_llama
from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.check_reach import check_reach
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.tools import reach_cli
from tsa_compile.tools.reach_page import reach_curves


def test_curves_have_a_corner_where_the_bridge_ends():
    curves = reach_curves(check_reach([Edges.bridges(64, 16, 16)] * 8, 1024))
    assert list(curves) == ["1 attention", "2 attentions", "4 attentions", "8 attentions"]
    one = [(x, y) for x, y, _ in curves["1 attention"]]
    assert one == [(0, 17), (15, 32), (16, 17), (63, 64), (64, 17)]
    assert [name for _, _, name in curves["1 attention"]][:2] == ["phase 0: 16 tokens back", "phase 15: 31 tokens back"]


def test_windows_are_flat():
    curve = reach_curves(check_reach([Edges.window(5)] * 3, 100))["3 attentions"]
    assert [(x, y) for x, y, _ in curve] == [(0, 13), (1, 13)]


def test_the_command_writes_a_page(tmp_path, capsys):
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    (tmp_path / "plan.json").write_text(json.dumps(TokenSparse.paper().to_dict()))
    reach_cli.reach(str(tmp_path / "model"), tmp_path / "plan.json", 2000, "prefill", str(tmp_path / "page.html"))
    assert "token 1 cannot depend on token 0" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "polyline" in page
    assert "model.layers.1.self_attn" in page
