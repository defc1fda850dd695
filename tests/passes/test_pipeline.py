"""The pipeline: passes are counted and timed, dumps are written, and the verifier catches a policy that breaks its promise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import tsa_compile as tsa
from tests.passes.graphs import KEEP_ALL, by_dynamo
from tsa_compile.backend import Backend
from tsa_compile.passes import pipeline
from tsa_compile.passes.site import AttentionSite
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Emit, Policy


def attention(q, k, v, pad=None):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if pad is None else mask & pad[:, None, None])


def operands():
    return tuple(torch.randn(2, 2, 9, 16) for _ in range(3))


def exported() -> fx.GraphModule:
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v) + attention(q, k, v)

    with torch.no_grad():
        return torch.export.export(Attention(), operands()).graph_module


def test_the_passes_in_order():
    names = [p.__name__ for p in pipeline.PASSES]
    assert names == [
        "expand_attention",
        "find_attention",
        "decide_policy",
        "share_routes",
        "keep_states",
        "rewrite_attention",
        "drop_masks",
        "verify_graph",
    ]


def test_each_pass_is_counted_and_timed():
    result = pipeline.run_pipeline(exported(), lambda site: KEEP_ALL)
    assert list(result.counts) == [p.__name__ for p in pipeline.PASSES]
    assert list(result.counts.values()) == [0, 2, 2, 0, 0, 2, 0, 4]
    assert set(result.seconds) == set(result.counts)
    assert all(s >= 0 for s in result.seconds.values())


def test_the_report_has_what_the_passes_did_over_all_graphs():
    torch._dynamo.reset()
    backend = Backend(Plan(KEEP_ALL), "eager")
    compiled = torch.compile(attention, backend=backend, dynamic=False)
    with torch.no_grad():
        for length in (9, 20):
            compiled(*(torch.randn(2, 4, length, 16) for _ in range(3)))
    passes = backend.report.passes
    assert list(passes) == [p.__name__ for p in pipeline.PASSES]
    assert (passes["find_attention"].count, passes["rewrite_attention"].count) == (2, 2)
    assert passes["find_attention"].seconds > 0
    assert "rewrite_attention 2 in" in str(backend.report)
    assert backend.report.joined(backend.report).passes["find_attention"].count == 4


def test_a_dense_policy_keeps_every_attention():
    gm = exported()
    result = pipeline.run_pipeline(gm, lambda site: tsa.Dense())
    assert result.counts["rewrite_attention"] == 0
    assert sum("scaled_dot_product" in str(n.target) for n in gm.graph.nodes) == 2


def test_dead_masks_go_with_the_attention():
    gm = exported()
    pipeline.run_pipeline(gm, lambda site: KEEP_ALL)
    assert "tril" not in gm.code
    assert "scaled_dot_product_attention" not in gm.code


def test_the_policy_is_chosen_by_site():
    result = pipeline.run_pipeline(exported(), lambda site: KEEP_ALL if site.index == 1 else tsa.Dense())
    assert [d.reason is None for d in result.decisions] == [False, True]


def test_debug_dumps(tmp_path, monkeypatch):
    monkeypatch.setenv("TSA_DEBUG", str(tmp_path))
    by_dynamo(attention, *operands())
    (folder,) = tmp_path.iterdir()
    assert "scaled_dot_product_attention" in (folder / "before.py").read_text()
    assert "tsa.sparse_attention" in (folder / "after.py").read_text()
    assert "replaced" in (folder / "decisions.txt").read_text()


def test_the_identity_hashes_the_plan():
    one, other = (Plan(tsa.TokenSparse(coverage=c)).to_dict() for c in (0.1, 0.2))
    assert pipeline.pipeline_identity(one) == pipeline.pipeline_identity(dict(one))
    assert pipeline.pipeline_identity(one) != pipeline.pipeline_identity(other)


@dataclasses.dataclass(frozen=True)
class Broken(Policy):
    """Lowers to something it must not."""

    how: str = ""

    def refuse(self, site: AttentionSite) -> str | None:
        return None

    def attend(self, emit: Emit, site: AttentionSite, selection: None) -> Any:
        q, k, v = site.operands[:3]
        if self.how == "no operator":
            return emit(torch.ops.aten.clone.default, q)
        if self.how == "in place":
            return emit(torch.ops.aten.add_.Tensor, q, q)
        width = 8 if self.how == "shape" else 16
        v = emit(torch.ops.aten.slice.Tensor, v, 3, 0, width)
        # everything is right but that the key mask is forgotten
        rule = (0.0, 1, 1, 1, 0, 0, 0, "auto")
        return emit(torch.ops.tsa.token_sparse_attention.default, q, k, v, None, site.scale, *rule)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no operator", "emitted no tsa operator"),
        ("in place", "no tsa operator|not a functional operator"),
        ("shape", "the output was .* and is"),
        ("mask", "lost the key mask"),
    ],
)
def test_the_verifier_catches(how, message):
    pad = torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(Exception, match=message):
        by_dynamo(attention, *operands(), pad, policy=Broken(how))


@pytest.mark.parametrize(
    ("policy", "view", "users"),
    [(KEEP_ALL, torch.ops.tsa.key_view, [2, 2]), (tsa.BlockSparse(alpha=0.0), torch.ops.tsa.padding_range, [2, 2])],
    ids=["tokens", "blocks"],
)
def test_sites_with_the_same_mask_share_its_view(policy, view, users):
    def two(q, k, v, pad, other):
        x = attention(q, k, v, pad)
        y = attention(x, k, v, pad)
        return attention(y, k, v, other)

    pad, other = torch.rand(2, 9) < 0.7, torch.rand(2, 9) < 0.7
    graphs = []
    args = (*operands(), pad, other)

    def keep(gm, inputs):
        pipeline.run_pipeline(gm, lambda site: policy)
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        got = torch.compile(two, backend=keep)(*args)
        want = two(*args)
    views = graphs[0].graph.find_nodes(op="call_function", target=view.default)
    assert len(views) == 2
    assert [len(list(views[0].users)), len(list(views[1].users))] == users
    real = (pad & other)[:, None, :, None]
    torch.testing.assert_close(got * real, want.nan_to_num() * real, rtol=1e-5, atol=1e-5)
