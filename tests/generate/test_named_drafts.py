"""Drafts by name and by plan: what runs, and what is refused."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import tiny
from tests.generate.test_speculative import BATCH, both
from tsa_compile.generate.drafts import PolicyDraft
from tsa_compile.generate.named_drafts import NAMED, as_draft
from tsa_compile.generate.speculative_plan import plan_of
from tsa_compile.session import attached

pytest.importorskip("transformers")

LAYER = "model.layers.{}.self_attn"
LOCAL = tsa.HeadSplit((), sinks=4, window=6)
HEADS = tsa.Plan(decode=LOCAL, rules=[(LAYER.format(0), "decode", tsa.HeadSplit((1,), sinks=4, window=6))])
PAGES = tsa.PageSparse(pages=2, sinks=0, recent=1)
LISTS = tsa.Remembered("verify", keys=6, ratio=0.1)


@pytest.fixture(scope="module")
def models():
    """(untouched, transformed), of two layers."""
    torch._dynamo.reset()
    plain, ours = tiny("llama"), tiny("llama")
    return plain, tsa.transform(ours, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_every_name_drafts_the_models_tokens(models, name):
    want, got, seen = both(models, name, **BATCH)
    assert torch.equal(want, got)
    assert seen.draft_sites == seen.sparse_sites == (0 if name == "lookup" else 2)


def test_names_are_these_policies():
    assert NAMED["verify"]().policy == tsa.Remembered("verify", keys=256, ratio=0.07)
    assert NAMED["layer"]().policy == tsa.Remembered("verify", keys=256, ratio=0.07, share="layer")
    assert NAMED["pages"]().policy == tsa.PageSparse(keep=0.07)
    assert NAMED["window"]().policy == tsa.PageSparse(pages=65, sinks=1, recent=64)
    assert NAMED["lookup"]().policy is None


def test_a_plan_of_head_roles_drafts(models):
    """Its rules are for decode steps, which are exact here."""
    want, got, seen = both(models, HEADS, **BATCH)
    assert torch.equal(want, got)
    assert seen.draft_sites == seen.sparse_sites == 2
    assert 0 < seen.acceptance[0] < 1


def test_policies_for_drafts_come_before_those_of_decode_steps():
    plan = tsa.Plan(decode=LOCAL, draft=PAGES, rules=[(LAYER.format(0), "decode", LOCAL), (LAYER.format(1), "draft", LISTS)])
    assert as_draft(plan) == PolicyDraft(PAGES, (tsa.Plan(rules=[(LAYER.format(1), "draft", LISTS)]).rules))


def test_layers_draft_by_different_policies(models):
    """Verify steps list where drafts read lists, and there alone; the same plan again is the same object."""
    draft = tsa.Plan(draft=PAGES, rules=[(1, "draft", LISTS)])
    want, got, seen = both(models, draft, **BATCH)
    assert torch.equal(want, got)
    assert seen.draft_sites == seen.sparse_sites == 2
    session = attached(models[1])
    plan = plan_of(session, as_draft(draft))
    assert plan is plan_of(session, as_draft(tsa.Plan(draft=PAGES, rules=[(1, "draft", LISTS)])))
    for phase, policies in {"draft": (PAGES, LISTS), "verify": (tsa.Exact(), LISTS), "decode": (tsa.Exact(),) * 2}.items():
        assert tuple(plan.policy_at(LAYER.format(n), phase) for n in range(2)) == policies


def test_what_is_no_draft(models):
    for wrong, message in (
        ("suffix", r"one of \['verify', 'layer', 'pages', 'window', 'lookup', 'measured'\], got 'suffix'"),
        (tsa.Exact(), "draft: Exact is for decode and verify, not for draft"),
        (tsa.Plan(), "the plan has no policy for draft steps, and none for decode steps"),
        (tsa.Plan(decode=tsa.Exact()), "draft: Plan.decode: Exact is for decode and verify"),
        (tsa.Plan(decode=PAGES, rules=[(0, "decode", tsa.Exact())]), "draft: the rule for 0: Exact is for"),
        (tsa.Plan(draft=LISTS, rules=[(0, "draft", tsa.Remembered("verify"))]), "one form of list for all layers, got"),
    ):
        with pytest.raises(ValueError, match=message):
            tsa.speculative(wrong)
    with pytest.raises(TypeError, match=r"a plan, or one of .* got int"):
        tsa.speculative(3)
    session = attached(models[1])
    with pytest.raises(ValueError, match=r"no module of the model matches 'layers\.7'"):
        plan_of(session, as_draft(tsa.Plan(draft=PAGES, rules=[("layers.7", "draft", LISTS)])))
    with pytest.raises(ValueError, match=r"go by the indexes of a\.safetensors, the model's plan has those of None"):
        plan_of(session, as_draft(tsa.Plan(draft=PAGES, weights="a.safetensors")))
