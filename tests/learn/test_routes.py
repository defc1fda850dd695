"""Layers that share selections: similarity by loops, anchors by brute force, and plans that a model runs."""

from __future__ import annotations

import itertools

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.cache.models import cache_name
from tsa_compile.learn import routes
from tsa_compile.learn.anchors import best_anchors, greedy_anchors, similarity, top_pages, weights_of
from tsa_compile.learn.attention_masses import recorded
from tsa_compile.session import attached

LAST = 6


def test_similarity_is_captured_mass_over_the_most_that_could_be():
    masses = torch.rand(3, 2, 4, 9, dtype=torch.float64)
    forced = torch.zeros(4, 9, dtype=torch.bool)
    forced[:, 0] = forced[:, 8] = True
    wanted = torch.tensor([3, 2, 0, 4])
    got, low = similarity(masses, forced, wanted), similarity(masses, forced, wanted, 0.5)
    lists = [[[_best(masses[a, g, r], {0, 8}, int(wanted[r])) for r in range(4)] for g in range(2)] for a in range(3)]
    for a, b in itertools.combinations_with_replacement(range(3), 2):
        for h, g in itertools.product(range(2), repeat=2):
            rows = [_mass(masses[b, h, r], lists[a][g][r]) / _mass(masses[b, h, r], lists[b][h][r]) for r in range(4)]
            assert float(got[a, b, h, g]) == pytest.approx(min(rows))
            assert float(low[a, b, h, g]) == pytest.approx((sorted(rows)[1] + sorted(rows)[2]) / 2)
    assert (got <= 1 + 1e-12).all()
    assert (torch.stack([got[a, a].diagonal() for a in range(3)]) == 1).all()
    assert (got[2, 0] == 0).all()


def _best(masses, forced, wanted):
    free = sorted((p for p in range(len(masses)) if p not in forced), key=lambda p: (-float(masses[p]), p))
    return {*free[:wanted], *forced}


def _mass(masses, pages):
    return sum(float(masses[p]) for p in pages)


def test_equal_masses_give_the_lowest_page_and_pages_without_mass_are_none():
    masses = torch.tensor([[0.5, 0.2, 0.2, 0.2, 0.0]])
    forced = torch.tensor([[True, False, False, False, False]])
    assert top_pages(masses, forced, torch.tensor([2])).tolist() == [[False, True, True, False, False]]
    assert top_pages(masses, forced, torch.tensor([9])).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("max_span", [None, 3])
@pytest.mark.parametrize("seed", range(5))
def test_anchors_are_those_of_brute_force(seed, max_span):
    g = torch.Generator().manual_seed(seed)
    layers = 9
    weights = torch.rand(layers, layers, generator=g).triu()

    def worth(anchors):
        ends = [*anchors[1:], layers]
        if max_span is not None and any(e - a > max_span for a, e in zip(anchors, ends, strict=True)):
            return -1.0
        return sum(float(weights[a, a:e].double().sum()) for a, e in zip(anchors, ends, strict=True))

    for count in range(1 if max_span is None else 3, layers + 1):
        options = [[0, *rest] for rest in itertools.combinations(range(1, layers), count - 1)]
        assert worth(best_anchors(weights, count, max_span)) == pytest.approx(max(map(worth, options)))
    assert best_anchors(weights, layers) == list(range(layers))


def test_wrong_numbers_of_anchors_are_named():
    weights = torch.ones(4, 4)
    with pytest.raises(ValueError, match="anchors must be 1 to 4, the number of layers, got 5"):
        best_anchors(weights, 5)
    with pytest.raises(ValueError, match="2 anchors of at most 1 layers each do not make 4"):
        best_anchors(weights, 2, 1)
    with pytest.raises(ValueError, match="anchors must be 1 to 4"):
        greedy_anchors(4, 0, lambda _: 0.0)


def test_the_greedy_rule_takes_the_least_loss_each_time():
    cost = {1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0}
    asked = []

    def loss(anchors):
        asked.append(tuple(anchors))
        return sum(cost[n] for n in cost if n not in anchors)

    assert greedy_anchors(5, 2, loss) == ([0, 1], 6.0)
    assert asked[:4] == [(0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3)]
    assert len(asked) == 4 + 3 + 2


@pytest.fixture(scope="module")
def model():
    """Four layers; the second has the first's queries and keys, the fourth the third's, and these get the same hidden states."""
    torch.manual_seed(0)
    made = tiny_llama(num_hidden_layers=4, initializer_range=0.2)
    with torch.no_grad():
        for a, b in ((0, 1), (2, 3)):
            first, second = made.model.layers[a], made.model.layers[b]
            for part in (first.self_attn.o_proj, first.mlp.down_proj):
                part.weight.zero_()
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(second.self_attn, name).load_state_dict(getattr(first.self_attn, name).state_dict())
    return made


@pytest.fixture(scope="module")
def texts():
    g = torch.Generator().manual_seed(1)
    return [torch.randint(1, 128, (n,), generator=g) for n in (150, 130)]


POLICY = tsa.PageSparse(pages=4, recent=1)


def test_masses_are_those_of_the_softmax(model, texts):
    ids, before = texts[0][None], model.config._attn_implementation
    with recorded(model, LAST) as seen, torch.no_grad():
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert model.config._attn_implementation == before
    assert list(seen.masses) == [f"model.layers.{n}.self_attn" for n in range(4)]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False, output_attentions=True)
    model.set_attn_implementation(before)
    for masses, attention in zip(seen.masses.values(), want.attentions, strict=True):
        pages = torch.nn.functional.pad(attention[0, :, -LAST:], (0, 10)).unflatten(-1, (10, 16)).sum(-1)
        torch.testing.assert_close(masses, pages.unflatten(0, (2, 2)).mean(1), rtol=1e-4, atol=1e-5)
    assert seen.importance["model.layers.0.self_attn"] == pytest.approx(0, abs=1e-6)  # its output projection is zero
    assert seen.importance["model.layers.1.self_attn"] > 1e-4
    torch.testing.assert_close(hidden[1], hidden[0])


def test_alike_layers_are_found_and_the_plan_runs(model, texts):
    plan = routes.plan_routes(model, texts, POLICY, 2, last=LAST, max_span=2, progress=False)
    assert plan.notes["anchors"] == [0, 2]
    assert plan.reuse == (
        ("model.layers.1.self_attn", "model.layers.0.self_attn", (0, 1), "decode"),
        ("model.layers.3.self_attn", "model.layers.2.self_attn", (0, 1), "decode"),
    )
    assert list(plan.notes["similarity to the anchor"].values()) == [pytest.approx(1.0)] * 2
    blocks = tsa.BlockSparse()
    both = routes.plan_routes(model, texts, POLICY, 2, last=LAST, max_span=2, prefill=blocks, progress=False)
    assert both.prefill == blocks
    assert both.reuse == plan.reuse + tuple(entry._replace(phase="prefill") for entry in plan.reuse)
    logits = []
    torch._dynamo.reset()
    session = attached(tsa.transform(model, plan))
    try:
        for chosen in (plan, tsa.Plan(prefill=tsa.Dense(), decode=POLICY)):
            session.plan = chosen  # the same trace
            given = {cache_name(model): tsa.Cache(model, 1, 200)}
            with torch.no_grad():
                model(input_ids=texts[0][None, :-1], **given)
                logits.append(model(input_ids=texts[0][None, -1:], **given).logits)
            assert tsa.report(model).warnings == []
    finally:
        tsa.restore(model)
    torch.testing.assert_close(*logits)  # alike layers select alike


def test_what_is_not_read_of_the_index_is_read_of_pages(model, texts):
    """Three of four layers read no means, each a 32nd of all that a layer keeps."""
    asked = tsa.PageSparse(keep=0.25)
    assert routes.widened(asked, 0.25).keep == pytest.approx(0.25 + 0.75 / 32)
    assert routes.widened(asked, 1.0) == asked
    assert routes.widened(tsa.PageSparse(keep=0.99), 0.1).keep == 1.0
    for other in (POLICY, tsa.PageSparse(schedule=(3,)), tsa.PageSparse(keep=0.25, kind="basis")):
        assert routes.widened(other, 0.25) == other
    for same_bytes, keep in ((True, 0.25 + 0.5 / 32), (False, 0.25)):
        plan = routes.plan_routes(model, texts[:1], asked, 2, last=LAST, same_bytes=same_bytes, progress=False)
        assert plan.decode == tsa.PageSparse(keep=keep)


@pytest.mark.slow
def test_anchors_by_loss_are_those_that_cost_nothing(model, texts):
    torch._dynamo.reset()
    plan = routes.plan_routes(model, texts[:1], POLICY, 2, method="loss", last=LAST, progress=False)
    assert plan.notes["anchors"] in ([0, 2], [0, 3])  # the third layer adds nothing: whose lists it reads is all the same
    own = routes.plan_routes(model, texts[:1], POLICY, 3, method="loss", last=LAST, progress=False)
    assert plan.notes["kl"] == pytest.approx(own.notes["kl"], abs=1e-6)  # the same as with one anchor more


def test_what_is_wrong_is_named(model, texts):
    for change, message in (
        (dict(method="best"), "method must be one of"),
        (dict(method="loss", max_span=2), "'loss' has no max_span"),
        (dict(quantile=1), r"quantile must be in \[0, 1\), got 1"),
        (dict(policy=tsa.PageSparse(mass=0.9)), "policy must have one budget for all heads"),
        (dict(anchors=9), "anchors must be 1 to 4"),
        (dict(prefill=tsa.Dense()), r"prefill must be a policy whose lists others can read, got Dense\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            routes.plan_routes(**dict(model=model, prompts=texts, policy=POLICY, anchors=2, last=LAST, progress=False) | change)
    with pytest.raises(ValueError, match="LlamaAttention has a mask, a batch or a cache"), recorded(model, 1), torch.no_grad():
        model(input_ids=texts[0][None].expand(2, -1))
    assert weights_of(torch.ones(2, 2, 3, 3), torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0], [1.0, 2.0]]
