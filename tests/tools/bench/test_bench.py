"""The benchmark's own parts: inputs, cases, peers, output; on a GPU, a whole case."""

from __future__ import annotations

import json

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.tools.bench import attention_bench, cases, inputs, output


def test_structured_inputs_can_be_sparsified():
    """The same selection keeps much less of them than of noise."""
    kept = []
    q, k, _ = inputs.structured(1, 4, 2, 2048, 64, torch.float32, "cpu")
    for keys in (k, torch.randn_like(k)):
        kept.append(torch.ops.tsa.select_tokens(q, keys, None, None, 0.125, 0.2, 128, 7, 64, 0)[1].item())
    assert kept[0] < 0.8 * kept[1]


def test_rope_keeps_lengths_and_turns_by_distance():
    x = torch.ones(1, 16, 1, 8)
    turned = inputs.rope(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    products = (turned[0, :, 0] @ turned[0, :, 0].T).diagonal(3)  # depends on the distance alone
    torch.testing.assert_close(products, products[:1].expand_as(products))


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_a_forced_selection_is_ascending_and_of_the_size_asked(keep):
    indices, counts, heavy = inputs.forced(torch.rand(2, 3, 200), keep, window=8, heavy=5)
    assert counts.tolist() == [max(8, round(keep * 200))] * 2
    kept = indices[..., : counts[0]]
    assert (kept.diff(dim=-1) > 0).all()
    assert (indices[..., counts[0] :] == -1).all()
    assert (kept[..., -8:] == torch.arange(192, 200)).all()
    assert (heavy.diff(dim=-1) > 0).all()


def test_cases_are_found_by_name():
    assert {c.length for c in cases.select_cases("L128K")} == {131072}
    with pytest.raises(ValueError, match="no case matches 'L1M'"):
        cases.select_cases("L1M")


def test_a_peer_is_a_function_in_a_file(tmp_path):
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("def attention(q, k, v): return q")
    bad.write_text("x = 1")
    assert attention_bench.load_peer(str(good))(1, 2, 3) == 1
    with pytest.raises(ValueError, match="has no function attention"):
        attention_bench.load_peer(str(bad))
    with pytest.raises(FileNotFoundError, match="no such file"):
        attention_bench.load_peer(str(tmp_path / "none.py"))


def row(length: int) -> attention_bench.AttentionRow:
    case = cases.AttentionCase(f"L{length}", length)
    fixed = dict(select=0.1, select_in_graph=0.1, structured_keep=0.3, sparse_in_graph={"fused": 0.9}, error={"fused": 1e-3})
    fixed |= dict(dense_in_graph={}, stages={"scores": 0.05})
    return attention_bench.AttentionRow(
        case, dense={"SDPA": 4.0}, sparse={"fused": 1.0}, completed={"fused": 1.2}, memory={"fused": 10}, **fixed
    )


def test_output(tmp_path):
    rows = [row(4096), row(8192)]
    gpu = {"gemm_tflops": 800.0, "copy_tbps": 4.0}
    table = output.attention_table(rows, gpu)
    assert table.row_count == 2
    output.write_json(str(tmp_path / "r.json"), rows, ceilings=gpu)
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["rows"][1]["case"]["length"] == 8192
    output.write_html(str(tmp_path / "r.html"), "Speed <up>", output.attention_plot(rows), ["a & b"])
    page = (tmp_path / "r.html").read_text()
    assert page.count("<polyline") == 1
    assert "Speed &lt;up&gt;" in page


@pytest.mark.gpu
def test_a_case_on_the_gpu():
    result = attention_bench.bench_case(cases.AttentionCase("L4K", 4096, heads=8, kv_heads=2), {})
    assert 0 < result.select < result.sparse["fused"]
    assert max(result.error.values()) < attention_bench.TOLERANCE


@pytest.mark.gpu
def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(attention_bench, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        attention_bench.bench_case(cases.AttentionCase("L4K", 4096, heads=8, kv_heads=2), {})
