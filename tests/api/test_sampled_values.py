"""SampledValues: the policy in eager code and in a graph, its fields, and whole models by `generate()`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call, from_dict
from tsa_compile.policies.why_dense import why_dense
from tsa_compile.session import attached
from tsa_compile.steps import FIXED


def site_of(rows=1, length=500, phase="decode"):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h, n in ((4, rows), (2, length), (2, length)))
    view = KvView(None, 1, None, torch.tensor([500, 77], dtype=torch.int32))
    return AttentionSite.of(Operands(q, k, v + 1, None, view), MaskFacts(causal=True), phase=phase)


def attended(policy, site, state=None):
    assert why_dense(policy, site) is None
    return policy.attend(call, site, policy.select(call, site, state))


@pytest.mark.parametrize("form", ["prop", "flash", "teams"])
def test_as_many_samples_as_keys_are_exact_and_fewer_are_near_it(form):
    site = site_of()
    exact = attended(tsa.Exact(), site)
    torch.testing.assert_close(attended(tsa.SampledValues(500, form), site), exact)
    sampled = attended(tsa.SampledValues(200, form), site)
    torch.testing.assert_close(sampled[1], exact[1])  # of 77 keys
    assert 0 < (sampled[0] - exact[0]).norm() < 0.5 * exact[0].norm()


def test_the_seed_is_the_caches_or_torchs_generator():
    site, policy, state = site_of(), tsa.SampledValues(8), {"seed": torch.tensor([5, 5])}
    assert torch.equal(attended(policy, site, state), attended(policy, site, state))
    first, second = attended(policy, site), attended(policy, site)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    third = attended(policy, site)
    torch.manual_seed(3)
    assert torch.equal(third, attended(policy, site))


def test_in_one_graph():
    site, policy = site_of(), tsa.SampledValues(200)
    state = {"seed": torch.tensor([5])}
    step = torch.compile(lambda: attended(policy, site, state), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(), attended(policy, site, state))


def test_fields_and_refusals():
    for fields, message in (
        ({"samples": 0}, "SampledValues.samples must be an int >= 1 and <= 4096, got 0"),
        ({"samples": 8, "form": "iid"}, r"SampledValues.form must be one of \('prop', 'flash', 'teams'\), got 'iid'"),
        (
            {"samples": 8, "form": "teams", "representatives": 5},
            "SampledValues.representatives must be an int >= 1 and <= 4, got 5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tsa.SampledValues(**fields)
    assert why_dense(tsa.SampledValues(8), site_of(2)) == "2 query rows: values are sampled for one"
    assert why_dense(tsa.SampledValues(8), site_of(phase="draft")) == "draft: SampledValues is for decode"
    for policy in (tsa.SampledValues(8, "flash"), tsa.SampledValues(64, "teams", representatives=2, recent=1)):
        assert from_dict(policy.to_dict()) == policy
    biased = site_of()
    biased = dataclasses.replace(biased, operands=biased.operands._replace(mask=torch.zeros(2, 1, 1, 500)))
    assert why_dense(tsa.SampledValues(64, "teams"), biased) == "a mask as data: teams are drawn without it"


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    torch._dynamo.reset()
    return tsa.transform(tiny("llama"), tsa.Plan(prefill=tsa.Dense(), decode=tsa.SampledValues(64)))


def generated(model, seed, ids, new=6):
    torch.manual_seed(seed)
    told = dict(do_sample=False, output_logits=True, return_dict_in_generate=True, attention_mask=torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=new, **told)


def test_generate_draws_anew_for_each_request_layer_and_step(model):
    ids = token_ids(150, 2)
    a, b, again = (generated(model, seed, ids) for seed in (0, 1, 0))
    assert all(torch.equal(x, y) for x, y in zip(a.logits, again.logits, strict=True))
    assert torch.equal(a.logits[0], b.logits[0])  # of the prompt
    assert not torch.equal(a.logits[1], b.logits[1])
    exact = tiny("llama").generate(ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert 1e-5 < (a.logits[1] - exact.logits[1]).norm() / exact.logits[1].norm() < 0.25
    assert tsa.report(model).steps == {FIXED: 15}
    session = attached(model)
    graph = session.backend.graphs[-1].form(session.plan).gm.graph
    names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert not any("randint" in n for n in names)  # the cache's seeds
    seeds = [layer.state("sample_seed")["seed"] for run in (a, b) for layer in run.past_key_values.layers]
    assert all((s == s[0]).all() for s in seeds)
    assert len({int(s[0]) for s in seeds}) == 4


def test_a_row_that_was_copied_goes_on_with_other_draws(model):
    """Beams of one prompt: the cache's rows are copies, and draw apart."""
    transformers = pytest.importorskip("transformers")
    ids, cache = token_ids(150).expand(2, -1), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids, attention_mask=torch.ones(2, 150, dtype=torch.long), **{cache_name(model): cache})
        token = first.logits[:, -1:].argmax(-1)
        step = model(token, attention_mask=torch.ones(2, 151, dtype=torch.long), **{cache_name(model): cache})
    assert not torch.equal(step.logits[0], step.logits[1])
    cache.reorder_cache(torch.tensor([0, 0]))
    assert len({int(s) for s in cache.layers[0].state("sample_seed")["seed"]}) == 1


def test_a_model_without_a_cache_of_ours_draws_from_torchs_generator():
    model = tsa.transform(tiny("mistral", layers=1), tsa.Plan(prefill=tsa.Dense(), decode=tsa.SampledValues(4)))
    ids = token_ids(20)
    a, b, c = (generated(model, seed, ids, 3) for seed in (0, 1, 0))
    assert all(torch.equal(x, y) for x, y in zip(a.logits, c.logits, strict=True))
    assert tsa.report(model).steps
    assert not torch.equal(a.logits[1], b.logits[1])


def test_teams_are_kept_beside_the_cache_and_all_of_them_are_exact():
    """Logits are the untouched model's with as many samples as rows, and near them with fewer; no step makes teams anew."""
    pytest.importorskip("transformers")
    torch._dynamo.reset()
    ids, told = token_ids(155, 2), dict(max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True)
    exact, model = tiny("llama").generate(ids, **told), tiny("llama")
    plans = [tsa.Plan(prefill=tsa.Dense(), decode=tsa.SampledValues(n, "teams", recent=1)) for n in (200, 48)]
    session = attached(tsa.transform(model, plans[0]))
    for plan, low, high in ((plans[0], 0.0, 1e-5), (plans[1], 1e-5, 0.5)):
        torch.manual_seed(0)
        session.plan = plan
        run = model.generate(ids, attention_mask=torch.ones_like(ids), **told)
        assert low <= (run.logits[1] - exact.logits[1]).norm() / exact.logits[1].norm() <= high
        graph = session.backend.graphs[-1].form(session.plan).gm.graph
        names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
        assert sum("append_teams" in n for n in names) == sum("team_attention" in n for n in names) == 2
        assert not any("page_teams" in n or "randint" in n for n in names)
        layer = run.past_key_values.layers[0]
        made = torch.ops.tsa.page_teams(layer.keys.contiguous(), None, 1, None, None, None, 4)
        assert torch.equal(layer.state("page_teams 4")["teams"][:, :, :10], made[:, :, :10])  # of 161 rows
