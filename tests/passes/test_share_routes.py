"""One selection for several layers (`Plan.reuse`): what it computes, one select in the graph, and every reason against it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tsa_compile.plan import without_session
from tsa_compile.policies.base import call
from tsa_compile.reuse import Reuse
from tsa_compile.session import Session, attached
from tsa_compile.steps import FIXED

PAGES = tsa.PageSparse(pages=4, recent=1)
DENSE = {"prefill": tsa.Dense()}


class Attention(nn.Module):
    def __init__(self, heads=4, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.k, self.v = (nn.Linear(32, n * 8, bias=False) for n in (heads, kv_heads, kv_heads))
        self.out = nn.Linear(heads * 8, 32, bias=False)

    def parts(self, x, memory):
        shapes = ((self.q, x, self.heads), (self.k, memory, self.kv_heads), (self.v, memory, self.kv_heads))
        return (layer(y).unflatten(-1, (n, 8)).transpose(1, 2) for layer, y, n in shapes)

    def forward(self, x, memory):
        q, k, v = self.parts(x, memory)
        causal = x.shape[1] > 1
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


class Step(nn.Module):
    """One query row over a memory, layer after layer."""

    def __init__(self, *kv_heads, between=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Attention(4, n)}) for n in kv_heads)
        self.between = between

    def forward(self, x, memory):
        for n, layer in enumerate(self.layers):
            if n and self.between is not None:
                self.between()
            x = x + layer["attn"](x, memory)
        return x


def by_hand(model, x, memory, anchor_of):
    """Layer by layer with the policies' own operators; `anchor_of`: layer -> (anchor, heads)."""
    from tsa_compile.kernels.types import Operands, Pages
    from tsa_compile.passes.site import AttentionSite, MaskFacts

    lists = {}
    for n, layer in enumerate(model.layers):
        q, k, v = layer["attn"].parts(x, memory)
        site = AttentionSite.of(Operands(q, k, v), MaskFacts(), phase="decode")
        if n in anchor_of:
            anchor, heads = anchor_of[n]
            selection = Pages(*(t[:, list(heads)].contiguous() for t in lists[anchor]))
        else:
            selection = lists[n] = PAGES.select(call, site, None)
        x = x + layer["attn"].out(PAGES.attend(call, site, selection).transpose(1, 2).flatten(2))
    return x


@pytest.fixture
def inputs():
    return torch.randn(2, 1, 32), torch.randn(2, 200, 32)


def run(model, inputs, plan):
    torch._dynamo.reset()
    session = Session(model.eval(), plan)
    with torch.no_grad():
        return session(*inputs), session


def operators(session, name):
    graph = session.backend.graphs[0].form(session.plan).gm.graph
    return sum(str(n.target).startswith(f"tsa.{name}") for n in graph.nodes)


@pytest.mark.parametrize("heads", [None, (1, 0), (1, 1)], ids=["same heads", "swapped", "one list"])
def test_a_layer_reads_what_its_anchor_selected(inputs, heads):
    model = Step(2, 2, 2)
    plan = tsa.Plan(decode=PAGES, reuse=[(1, 0, heads), (2, 0)], **DENSE)
    got, session = run(model, inputs, plan)
    with torch.no_grad():
        torch.testing.assert_close(got, by_hand(model, *inputs, {1: (0, heads or (0, 1)), 2: (0, (0, 1))}))
    assert (operators(session, "select_pages"), operators(session, "page_attention")) == (1, 3)
    notes = [site.reason for site in session.report.sites]
    assert notes[0].startswith("page sums not kept between steps: k is computed")
    assert notes[1:] == ["selection of layers.0.attn"] * 2
    assert session.report.warnings == []


def test_a_map_joins_layers_with_other_heads(inputs):
    model = Step(2, 4)
    got, _ = run(model, inputs, tsa.Plan(decode=PAGES, reuse=[("layers.1", "layers.0", (0, 0, 1, 1))], **DENSE))
    with torch.no_grad():
        torch.testing.assert_close(got, by_hand(model, *inputs, {1: (0, (0, 0, 1, 1))}))


def test_a_plan_switched_between_calls_is_obeyed(inputs):
    model = Step(2, 2)
    own = tsa.Plan(decode=PAGES, **DENSE)
    shared, session = run(model, inputs, tsa.Plan(decode=PAGES, reuse=[(1, 0)], **DENSE))
    session.plan = own
    with torch.no_grad():
        apart = session(*inputs)
        torch.testing.assert_close(apart, by_hand(model, *inputs, {}))
    assert not torch.equal(apart, shared)


def break_graph():
    torch._dynamo.graph_break()


EXACT_0 = dict(rules=[(0, "decode", tsa.Exact())])


@pytest.mark.parametrize(
    ("kv_heads", "reuse", "more", "reason"),
    [
        ((2, 2), [(0, 1)], {}, "layers.0.attn selects by itself: layers.1 does not come before it"),
        ((2, 2), [(1, 0)], EXACT_0, "layers.1.attn selects by itself: layers.0 has another policy"),
        ((2, 2), [(1, 0)], dict(rules=[(0, "decode", tsa.Dense())]), "layers.0 is not replaced: decode step: one query"),
        ((2, 2, 2), [(1, 0), (2, 1)], {}, "layers.2.attn selects by itself: layers.1 takes another's selection itself"),
        ((2, 4), [(1, 0)], {}, "layers.0 has other heads, and no map is given"),
        ((2, 2), [(1, 0, (0, 2))], {}, "the map (0, 2) does not fit 2 KV heads that read lists of 2"),
        ((2, 2), [(1, 0, (0,))], {}, "the map (0,) does not fit 2 KV heads"),
        ((2, 2, 2), [(2, "layers.[01]")], {}, "layers.[01] is 2 attentions of this graph"),
        ((2, 2), [(1, 0)], dict(decode=tsa.Exact()), "Exact makes no list that others can read"),
        ((2, 2), [(1, 0)], dict(decode=tsa.SampledValues(8)), "SampledValues makes no list that others can read"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(inputs, kv_heads, reuse, more, reason):
    plan = tsa.Plan(**{"decode": PAGES, **DENSE, **more}, reuse=reuse)
    _, session = run(Step(*kv_heads), inputs, plan)
    assert any(reason in warning for warning in session.report.warnings)


def test_layers_in_other_graphs_select_by_themselves(inputs):
    model = Step(2, 2, between=break_graph)
    got, session = run(model, inputs, tsa.Plan(decode=PAGES, reuse=[(1, 0)], **DENSE))
    with torch.no_grad():
        torch.testing.assert_close(got, by_hand(model, *inputs, {}))
    assert any("a graph that begins inside of the model may run for several layers" in w for w in session.report.warnings)


def test_reuse_outside_of_a_session_is_an_error():
    plan = tsa.Plan(decode=PAGES, reuse=[(1, 0)])
    with pytest.raises(ValueError, match=r"Plan.reuse needs the graph of several layers"):
        without_session(plan)
    with pytest.raises(ValueError, match=r"plan reuse 0: no module of the model matches 'layer.*'"):
        Session(Step(2, 2), tsa.Plan(decode=PAGES, reuse=[("layer.*", 0)]))
    with pytest.raises(ValueError, match="the model has no layer 7"):
        Session(Step(2, 2), tsa.Plan(decode=PAGES, reuse=[(1, 7)]))


def test_a_plan_with_reuse_is_json():
    plan = tsa.Plan(decode=PAGES, reuse=[Reuse("model.layers.[1-3]", 0, (1, 0)), (4, 0, None, "draft")])
    assert tsa.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert tsa.Plan(reuse=[]).reuse is None


def test_generate_shares_one_selection_by_the_states_of_the_cache():
    """The step's graph has one selection for two layers, on the cache's page sums, and other logits than with two."""
    transformers = pytest.importorskip("transformers")
    found = []
    for reuse in (None, [(1, 0)]):
        torch._dynamo.reset()
        model = tsa.transform(tiny("llama"), tsa.Plan(decode=tsa.PageSparse(pages=4, recent=1), reuse=reuse, **DENSE))
        ids, cache = token_ids(150, 2), transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            for part in (ids[:, :147], ids[:, 147:148], ids[:, 148:149], ids[:, 149:]):
                out = model(part, **{cache_name(model): cache})
        session = attached(model)
        graph = session.backend.graphs[-1].form(session.plan).gm.graph
        names = [str(n.target) for n in graph.nodes if "tsa." in str(n.target)]
        counts = tuple(sum(part in n for n in names) for part in ("append_pages", "select_pages", "page_attention"))
        found.append((counts, out.logits))
        assert tsa.report(model).steps == {FIXED: 3}
    assert [f[0] for f in found] == [(2, 2, 2), (1, 1, 2)]
    assert not torch.equal(found[0][1], found[1][1])
    assert (found[0][1] - found[1][1]).norm() < 0.5 * found[0][1].norm()


BLOCKS = tsa.BlockSparse(alpha=0.9, pool=16, window=2, sinks=0, last_dense=0)
TOKENS = tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8, completion=tsa.Completion(4, 2, 4))


@pytest.mark.parametrize("policy", [BLOCKS, pytest.param(TOKENS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", [pytest.param(None, marks=pytest.mark.slow), (1, 0)], ids=["same heads", "swapped"])
def test_a_prefill_shares_one_selection(policy, heads):
    """Two layers with the same projections, or with their heads swapped, and a first one that adds nothing: own and shared
    selections are one."""
    torch._dynamo.reset()
    model = tiny("llama")
    first, second = model.model.layers
    second.input_layernorm.load_state_dict(first.input_layernorm.state_dict())
    with torch.no_grad():
        first.self_attn.q_proj.weight *= 60  # attention that is not uniform
        for name in ("q_proj", "k_proj", "v_proj"):
            of_heads = getattr(first.self_attn, name).weight.unflatten(0, (2, -1))  # of KV heads
            getattr(second.self_attn, name).weight.copy_(of_heads[list(heads or (0, 1))].flatten(0, 1))
        for layer in (first.self_attn.o_proj, first.mlp.down_proj):
            layer.weight.zero_()
    ids, found = token_ids(400), []
    maps = [heads] if heads is None else [heads, (0, 1)]  # the second: as if there were no map
    for reuse in (None, *([(1, 0, each, "prefill")] for each in maps)):
        session = Session(model, tsa.Plan(prefill=policy, reuse=reuse))
        with torch.no_grad():
            found.append(session(ids, use_cache=False).logits)
        assert session.report.warnings == []
    assert session.report.sites[1].reason.endswith("selection of model.layers.0.self_attn")
    torch.testing.assert_close(*found[:2])
    if heads is not None:
        assert not torch.allclose(found[0], found[2], rtol=1e-4)  # without the map they are other lists


def test_groups_of_other_sizes_are_refused_in_prefill():
    plan = tsa.Plan(prefill=BLOCKS, reuse=[(1, 0, (0, 0, 1, 1), "prefill")])
    x = torch.randn(1, 300, 32)
    _, session = run(Step(2, 4), (x, x), plan)
    assert any("layers.0 has other groups of query heads" in warning for warning in session.report.warnings)
