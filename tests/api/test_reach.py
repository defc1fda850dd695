"""What policies guarantee is what their operators read; `tsa.reach` and the report say what that leaves out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import SPARSE, Attention, Layers, token_ids
from tsa_compile.kernels.edges import ALL_KEYS, Edges
from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call
from tsa_compile.policies.why_dense import edges_of

PAPER = tsa.TokenSparse.paper(coverage=0.9, window=8, min_tokens=8)
NARROW = dataclasses.replace(PAPER, completion=tsa.Completion(12, 2, 4))
INNER = tsa.BlockSparse(alpha=0.999, pool=32, window=10, sinks=0, last_dense=0)
BLOCKS = dataclasses.replace(PAPER, coverage=0.0, inner=INNER)


def site(length: int = 400, rows: int | None = None, kind: str = "prefill", causal: bool = True) -> AttentionSite:
    """Keys of which a few outshine all others; value `i` is the i-th unit vector, so that the output is the weights."""
    rows = rows or length
    q, k = torch.randn(1, 4, rows, 16, dtype=torch.float64), torch.randn(1, 2, length, 16, dtype=torch.float64)
    k[:, :, 5:25] *= 4
    v = torch.eye(length, dtype=torch.float64).expand(1, 2, -1, -1)
    return dataclasses.replace(AttentionSite.of(Operands(q, k, v), MaskFacts(causal), 0.5, phase=kind), v_head_dim=200)


def read_by_all_heads(policy, at: AttentionSite) -> torch.Tensor:
    """bool `[Lq, Lk]`; the weights come 200 keys at a time, as a value has at most 256 numbers."""
    selection, weights = policy.select(call, at, None), []
    for v in at.operands.v.split(200, -1):
        part = dataclasses.replace(at, operands=at.operands._replace(v=v))
        weights.append(policy.attend(call, part, selection)[0])
    return (torch.cat(weights, -1) > 0).all(0)


def as_mask(edges: Edges, rows: int, length: int) -> torch.Tensor:
    return edges.mask(length)[length - rows :]


@pytest.mark.parametrize(
    ("policy", "rows", "kind"),
    [
        (PAPER, None, "prefill"),
        (NARROW, None, "prefill"),
        (dataclasses.replace(NARROW, inner=INNER), None, "prefill"),
        (dataclasses.replace(NARROW, inner=dataclasses.replace(INNER, alpha=0.0)), None, "prefill"),
        (BLOCKS, None, "prefill"),
        (dataclasses.replace(PAPER, coverage=0.0), None, "prefill"),
        (dataclasses.replace(PAPER, min_tokens=395), None, "prefill"),
        (INNER, None, "prefill"),
        (tsa.BlockSparse(alpha=0), None, "prefill"),
        (tsa.PageSparse(pages=3, sinks=0, recent=2), 1, "decode"),
        (tsa.PageSparse(keep=1.0), 1, "decode"),
        (tsa.Exact(), 3, "decode"),
    ],
    ids=str,
)
def test_what_is_guaranteed_is_read(policy, rows, kind):
    at = site(rows=rows, kind=kind)
    edges, read = edges_of(policy, at), read_by_all_heads(policy, at)
    sure = as_mask(edges, at.q_len, at.k_len)
    if edges != Edges.none():
        assert read[sure].all()
    whole = as_mask(Edges.every(), at.q_len, at.k_len)
    assert (edges == Edges.every()) == torch.equal(read, whole)


def test_a_window_that_is_guaranteed_is_no_narrower_than_it_must_be():
    """One key further is not read by some row: selections do not happen to read everything."""
    for policy in (NARROW, BLOCKS, INNER):
        at = site()
        edges, read = edges_of(policy, at), read_by_all_heads(policy, at)
        further = Edges(edges.period, tuple(tuple((a, b + 1) for a, b in run) for run in edges.spans))
        assert not read[as_mask(further, at.q_len, at.k_len)].all()


def test_probes_guarantee_all_or_nothing():
    sparse = tsa.ProbeSparse(coverage=0.3, probes=8, min_keys=8)
    assert edges_of(sparse, site(causal=False)) == Edges.none()
    assert edges_of(dataclasses.replace(sparse, coverage=0.0), site(causal=False)) == Edges.every()
    assert edges_of(sparse, site(9, causal=False)) == Edges.every()


def test_a_site_that_stays_dense_has_its_own_edges():
    assert edges_of(PAPER, dataclasses.replace(site(), mask=MaskFacts(True, window=7))) == Edges.window(7)
    assert edges_of(PAPER, dataclasses.replace(site(), obstacle="inputs require gradients")) == Edges.every()
    unproven = dataclasses.replace(site(), mask=MaskFacts(), obstacle="mask is data")
    assert edges_of(PAPER, unproven) == edges_of(tsa.Dense(), unproven) == Edges.none()
    assert Edges.every() == Edges.window(ALL_KEYS)


def test_reach_of_plans():
    model = Layers()
    dense = tsa.reach(model, tsa.Dense(), 4096)
    assert (dense.distance, dense.pair, dense.needed) == (None, None, 1)
    assert [layer.module for layer in dense.layers] == ["layers.0", "layers.1"]
    default = tsa.reach(model, None, 4096)  # the key blocks of a window of 256 in two layers
    assert (default.distance, default.pair, default.needed) == (513, (127, 640), 16)
    assert "16 attentions would be enough" in str(default)
    strip = tsa.reach(model, tsa.TokenSparse(), 4096)  # of 256 in two layers
    assert (strip.distance, strip.pair, strip.needed) == (511, (0, 511), 17)
    paper = tsa.reach(model, tsa.TokenSparse.paper(), 4096)
    assert (paper.distance, paper.pair, paper.needed) == (1, (0, 1), None)
    assert "no depth is enough" in str(paper)
    mixed = tsa.Plan(prefill=tsa.TokenSparse.paper(), rules=[("layers.1", "prefill", tsa.Dense())])
    assert tsa.reach(model, mixed, 4096).distance is None
    decode = tsa.reach(model, tsa.PageSparse(keep=0.05, recent=2), 100, phase="decode")
    assert decode.distance == 16 * 2 + 1
    assert model(token_ids(20)).grad_fn is not None  # left as it was


def test_reach_sees_sliding_windows():
    transformers = pytest.importorskip("transformers")
    config = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    config |= dict(num_key_value_heads=2, sliding_window=40)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    assert tsa.reach(model, tsa.Dense(), 200).distance == 2 * 39 + 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0,), "length must be at least 1, got 0"),
        ((5, "train"), "phase must be one of .* got 'train'"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        tsa.reach(torch.nn.Linear(2, 2), None, given[0], phase=given[1] if len(given) > 1 else "prefill")


def test_a_module_without_token_ids_needs_inputs():
    with pytest.raises(ValueError, match="takes no input_ids: give reach the inputs of a call"):
        tsa.reach(torch.nn.Linear(2, 2), None, 5)
    with pytest.raises(ValueError, match="no attention was found in Linear"):
        tsa.reach(torch.nn.Linear(2, 2), None, 5, torch.zeros(1, 2))
    assert tsa.reach(Attention(), tsa.Dense(), 5, torch.zeros(1, 20, 32)).needed == 1


def test_a_plan_with_a_hole_warns_in_the_report():
    paper = dataclasses.replace(SPARSE, completion=None)
    for policy, warns in ((paper, True), (SPARSE, False), (tsa.Plan(prefill=paper, rules=[(0, "prefill", tsa.Dense())]), False)):
        model = tsa.transform(Layers(), policy)
        with torch.no_grad():
            model(input_ids=token_ids(40))
        found = [w for w in tsa.report(model).warnings if "sure to depend on the one before it" in w]
        assert len(found) == warns, policy
