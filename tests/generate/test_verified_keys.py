"""Remembered("verify"): drafts read what the last verify step looked at, and all that came since."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import cache_name, tiny, token_ids
from tests.generate.test_speculative import BATCH, LEFT, both
from tsa_compile.cache import storage
from tsa_compile.generate.named_drafts import as_draft
from tsa_compile.generate.speculative_plan import plan_of
from tsa_compile.policies.base import from_dict
from tsa_compile.session import attached

transformers = pytest.importorskip("transformers")

FEW = tsa.Remembered("verify", keys=6, ratio=0.1)
ONE = tsa.Remembered("verify", keys=6, ratio=0.1, share="layer")


@pytest.fixture(scope="module")
def models():
    torch._dynamo.reset()
    plain, ours = (tiny("llama", layers=1) for _ in range(2))
    return plain, tsa.transform(ours, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))


@pytest.mark.parametrize("draft", [FEW, pytest.param(ONE, marks=pytest.mark.slow)], ids=["by head", "by layer"])
@pytest.mark.parametrize("call", [BATCH, pytest.param({}, marks=pytest.mark.slow)], ids=["batch", "one"])
def test_tokens_are_the_models(models, call, draft):
    want, got, seen = both(models, draft, **call)
    assert torch.equal(want, got)
    assert not seen.notes
    assert 0 < min(seen.acceptance) < 1


@pytest.mark.slow
@pytest.mark.parametrize("draft", [FEW, tsa.PageSparse(pages=2, sinks=0, recent=1)], ids=["verify", "pages"])
@pytest.mark.parametrize("call", [{}, BATCH], ids=["one", "batch"])
def test_buffers_that_grow_in_a_round(models, draft, call, monkeypatch):
    """From 48 rows on: drafts and verify steps cross the end of the buffers."""
    monkeypatch.setattr(storage, "FIRST", 48)
    monkeypatch.setattr(storage, "CHUNK", 16)
    want, got, seen = both(models, draft, **call)
    assert torch.equal(want, got)
    assert 0 < min(seen.acceptance) < 1


@pytest.mark.slow
def test_layers_that_stay_dense(models):
    want, got, seen = both(models, tsa.Remembered("verify", keys=1, ratio=0.0, dense_layers=1))
    assert torch.equal(want, got)
    assert seen.acceptance == [1.0] * 4
    assert seen.draft_sites == seen.sparse_sites == 1  # by the policy, which reads every key there


@pytest.mark.slow
def test_lists_of_every_key_are_the_model_itself(models):
    want, got, seen = both(models, tsa.Remembered("verify", keys=64, ratio=0.0))
    assert torch.equal(want, got)
    assert seen.acceptance == [1.0] * 4


@pytest.mark.parametrize("draft", [FEW, ONE], ids=["by head", "by layer"])
def test_what_a_verify_step_lists_and_a_draft_reads(models, draft):
    """The lists are those of the untouched model's attention weights; a draft step is that model with the other keys hidden."""
    plain, ours = models
    session = attached(ours)
    plan = plan_of(session, as_draft(draft))
    ids, cache = BATCH["ids"], transformers.DynamicCache(config=ours.config)
    more, call = token_ids(6, 3, seed=5), {cache_name(ours): cache}
    positions = (LEFT.cumsum(1) - 1).clamp_min(0)
    mask = torch.cat([LEFT, torch.ones(3, 6, dtype=torch.long)], 1)
    ahead = positions[:, -1:] + torch.arange(1, 7)
    with torch.no_grad(), session.backend.under(plan):
        ours(ids, attention_mask=LEFT, position_ids=positions, **call)
        ours(more[:, :5], attention_mask=mask[:, :45], position_ids=ahead[:, :5], **call)
        with session.backend.under(plan, drafting=True):
            got = ours(more[:, 5:], attention_mask=mask, position_ids=ahead[:, 5:], **call).logits[:, -1]
    names = ("indices", "counts", "since")
    state = [[x.clone() for x in map(layer.state(draft.states()[0].name).get, names)] for layer in cache.layers]
    hidden = listed_only(plain, torch.cat([ids, more], 1), mask, torch.cat([positions, ahead], 1), state)
    torch.testing.assert_close(got, hidden, atol=1e-4, rtol=1e-4)


def listed_only(plain, ids, mask, positions, state):
    """Logits behind the last token where its attention reads, layer by layer, what lists of `state` say; the lists are checked.

    One call of the untouched model, eager: all rows but the last are exact, so its weights are those that the lists came from.
    """
    eager = tiny("llama", layers=1)
    eager.load_state_dict(plain.state_dict())
    eager.set_attn_implementation("eager")
    seen = []
    forward = transformers.models.llama.modeling_llama.eager_attention_forward

    def attend(module, query, key, value, attention_mask, **kwargs):
        out, weights = forward(module, query, key, value, attention_mask, **kwargs)
        seen.append(module.layer_idx)
        indices, counts, since = state[module.layer_idx]
        lists = counts.shape[1]
        shown = weights[:, :, [40, 44], :40].unflatten(1, (lists, -1)).mean((2, 3))  # the verify step's first and last row
        assert since.tolist() == [40] * 3
        read = torch.zeros(3, lists, 46, dtype=torch.bool)
        read[..., 40:] = True
        for b in range(3):
            real = int(mask[b, :40].sum())
            for g in range(lists):
                assert counts[b, g] == 6  # more than a tenth of them
                best = shown[b, g].masked_fill(mask[b, :40] == 0, -1).topk(min(6, real)).indices
                assert sorted(best.tolist()) == indices[b, g, : counts[b, g]].tolist()
                read[b, g, indices[b, g, : counts[b, g]].long()] = True
        last = attention_mask[:, :, -1:].masked_fill(~read.repeat_interleave(4 // lists, 1)[:, :, None], -torch.inf)
        end = forward(module, query[:, :, -1:], key, value, last, **kwargs)[0]
        return torch.cat([out[:, :-1], end], 1), weights

    patched = pytest.MonkeyPatch()
    patched.setattr(transformers.models.llama.modeling_llama, "eager_attention_forward", attend)
    try:
        with torch.no_grad():
            logits = eager(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    finally:
        patched.undo()
    assert seen == [0]
    return logits


def test_defaults_by_source_and_json():
    verify, diffusion = tsa.Remembered("verify"), tsa.Remembered("denoise_first")
    assert (verify.keys, verify.ratio, verify.dense_layers) == (256, 0.07, 0)
    assert (diffusion.keys, diffusion.ratio, diffusion.dense_layers) == (512, None, 2)
    assert (verify.phases, diffusion.phases) == ({"verify", "draft"}, {"denoise_first", "denoise"})
    for policy in (verify, diffusion, FEW, ONE):
        assert from_dict(policy.to_dict()) == policy
    assert tsa.Plan(verify=FEW, draft=FEW).draft == FEW
    with pytest.raises(ValueError, match=r"Plan\.draft: Remembered is for"):
        tsa.Plan(draft=diffusion)
    with pytest.raises(ValueError, match=r"Remembered\.ratio must be a number in"):
        tsa.Remembered("verify", ratio=1.5)
    with pytest.raises(ValueError, match="is for drafts and their verification: tsa_compile"):
        tsa.transform(tiny("llama", layers=1), verify)
