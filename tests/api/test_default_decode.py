"""The default plan's decode steps: `Exact` on a (faked) GPU where it was measured to pay, otherwise the model's own."""

from __future__ import annotations

import contextlib

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import LEFT, generate
from tsa_compile import default_decode, pays
from tsa_compile import session as sessions
from tsa_compile.session import attached
from tsa_compile.steps import FIXED, REPLAYED, Steps

transformers = pytest.importorskip("transformers")

STEP = pays.Timing("9.0", "Exact", 16, 4, 2, (16, 30, 60), (1.0, 1.0, 1.0), (2.0, 0.5, 0.5), (1.0, 1.0, 1.0))
PROMPT = pays.Timing("9.0", "BlockSparse", 16, 4, 2, (16, 300), (1.0, 1.0), (2.0, 0.5), (1.0, 1.0))
MODEL_DEVICE = default_decode.model_device
SHORT = "the model's own: below 30 cached tokens"
MODES = {
    "beams": dict(num_beams=3),
    "sampling": dict(do_sample=True, top_k=20),
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
}


@contextlib.contextmanager
def gpu(*rows, kind="cuda"):
    """A CPU is taken for a GPU of which these rows are known, and float32 for what was measured."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (default_decode, sessions):
            patch.setattr(module, "model_device", lambda model: torch.device(kind))
        patch.setattr(pays, "capability", lambda device: "9.0")
        patch.setattr(pays, "table", lambda: rows)
        patch.setattr(default_decode, "HALF", (torch.float32,))
        patch.setattr(Steps, "recorded_on", frozenset({"cpu"}))
        yield


@pytest.fixture(scope="module")
def models():
    """(untouched, transformed by default)."""
    torch._dynamo.reset()
    with gpu(STEP, PROMPT):
        yield tiny("llama", layers=1), tsa.transform(tiny("llama", layers=1))


def ran(models, **call):
    """How the steps of a generation ran, whose tokens are the untouched model's."""
    plain, ours = models
    before = tsa.report(ours).steps
    assert torch.equal(generate(ours, **call), generate(plain, **call))
    after = tsa.report(ours).steps
    return {how: n - before.get(how, 0) for how, n in after.items() if n > before.get(how, 0)}


def test_steps_from_the_measured_length_on(models):
    """19 steps over 20 to 38 tokens: those over fewer than 30 are the model's own, on a cache of ours."""
    how = ran(models, input_ids=token_ids(20), max_new_tokens=20)
    assert how.pop(SHORT) == 10
    assert how == {FIXED: 1, REPLAYED: 8}
    report = tsa.report(models[1])
    assert report.decode == "Exact from 30 cached tokens on, as measured on a GPU like this one"
    assert f"decode: {report.decode}" in str(report)
    steps = [site for site in report.sites if site.q_len == "1"]
    assert [(site.policy, site.replaced) for site in steps] == [("Exact", True)]
    assert not report.untraced


@pytest.mark.parametrize("mode", [pytest.param(m, marks=pytest.mark.slow if m != "beams" else ()) for m in MODES])
def test_modes_of_generate(models, mode):
    ids = token_ids(20).repeat(1, 2) if mode == "prompt lookup" else token_ids(40, 2)
    assert REPLAYED in ran(models, input_ids=ids, **MODES[mode])


def test_padding(models):
    how = ran(models, input_ids=token_ids(40, 2) * LEFT, attention_mask=LEFT)
    assert set(how) <= {FIXED, REPLAYED}


def test_a_cache_of_the_users_own(models):
    how = ran(models, input_ids=token_ids(40), cache_implementation="static", disable_compile=True)
    assert how == {"the model's own: StaticCache is no DynamicCache": 23}
    assert not any("StaticCache" in warning for warning in tsa.report(models[1]).warnings)


def test_a_step_that_others_compile(models):
    """As `generate()` compiles those over a static cache on a GPU."""
    logits = []
    for model in models:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            model(token_ids(40), **{cache_name(model): cache})
            step = torch.compile(model.__call__, backend="eager")
            logits.append(step(input_ids=token_ids(1), position_ids=torch.tensor([[40]]), **{cache_name(model): cache}).logits)
    torch.testing.assert_close(*logits)


def test_a_short_prompt_is_the_models_own_call_and_its_cache_ours(models):
    ours = models[1]
    attached(ours)(token_ids(40))  # once traced, it is known that nothing pays for so few
    calls, cache = tsa.report(ours).calls, transformers.DynamicCache(config=ours.config)
    with torch.no_grad():
        ours(input_ids=token_ids(40), **{cache_name(ours): cache})
    assert tsa.report(ours).calls == calls
    assert cache.layers[0].lease is not None
    assert cache.get_seq_length() == 40


def test_hooks_and_gradients(models):
    hook = models[1].model.layers[0].register_forward_hook(lambda *args: None)
    assert ran(models, input_ids=token_ids(40)) == {"the model's own: a forward hook": 23}
    hook.remove()
    ours, cache = models[1], transformers.DynamicCache(config=models[1].config)
    with torch.no_grad():
        ours(token_ids(40), **{cache_name(ours): cache})
    logits = ours(token_ids(1), **{cache_name(ours): cache}).logits
    assert logits.requires_grad


def test_steps_that_cannot_be_recorded(models):
    """Where a step does not run in one graph with every attention replaced, the request's others are the model's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attached(models[1]).backend, "replaced", lambda runs, calls=1: 0)
        how = ran(models, input_ids=token_ids(70))
    assert how == {FIXED: 1, "the model's own: could not be recorded": 22}


@pytest.mark.gpu
def test_on_a_gpu():
    """Recorded in CUDA graphs; the steps over a static cache are compiled by `generate()` itself."""
    with gpu(STEP), pytest.MonkeyPatch.context() as patch:
        for module in (default_decode, sessions):
            patch.setattr(module, "model_device", MODEL_DEVICE)
        patch.setattr(Steps, "recorded_on", frozenset({"cuda"}))
        plain, ours = tiny("llama", layers=1).cuda(), tsa.transform(tiny("llama", layers=1)).cuda()
        ids = token_ids(20).cuda()
        assert ran((plain, ours), input_ids=ids, max_new_tokens=20) == {SHORT: 10, FIXED: 1, REPLAYED: 8}
        assert torch.equal(*(generate(m, input_ids=ids, cache_implementation="static") for m in (plain, ours)))


SLOWER = pays.Timing("9.0", "Exact", 16, 4, 2, (16,), (1.0,), (2.0,), (1.0,), batch=8)


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ((STEP,), {}, "Exact from 30"),
        ((PROMPT,), {}, "not measured on a GPU like this one"),
        ((STEP, SLOWER), {}, "not faster at the longest"),
        ((STEP,), {"dtype": torch.float64}, "half precision"),
        ((STEP,), {"_can_compile_fullgraph": False}, "static caches"),
        ((STEP,), {"config._attn_implementation": "flex_attention"}, "'flex_attention'"),
    ],
)
def test_what_a_plan_has_by_default(rows, changes, said):
    model = tiny("llama", layers=1).to(changes.pop("dtype", torch.float32))
    for name, value in changes.items():
        setattr(model.config if name.startswith("config.") else model, name.removeprefix("config."), value)
    with gpu(*rows):
        found = default_decode.default_decode(tsa.Plan(where="pays"), model)
    assert said in found.said
    assert (found.plan.decode is None) == (found.pays_from is None) == ("from 30" not in said)


@pytest.mark.parametrize("settings", [{}, dict(decode=tsa.Dense(), where="pays"), dict(decode=tsa.Exact(), where="pays")])
def test_other_plans_say_it_themselves(settings):
    plan = tsa.Plan(**settings)
    with gpu(STEP):
        assert default_decode.default_decode(plan, tiny("llama", layers=1)) == (plan, None, "")


def test_a_model_that_moves():
    with gpu(STEP, kind="cpu"):
        model = tsa.transform(tiny("llama", layers=1))
        assert tsa.report(model).decode == "the model's own: the model is on cpu, not on cuda"
        assert not attached(model).plan.decodes
    for kind in ("cuda", "cpu"):
        with gpu(STEP, kind=kind), torch.no_grad():
            model(token_ids(40))
            assert attached(model).plan.decodes == (kind == "cuda")
