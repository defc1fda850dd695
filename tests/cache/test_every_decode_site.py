"""Every decode site of a model is replaced by `Exact`, whatever it does to its scores; tokens stay those of the model."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.cache.models import TINY, token_ids

LAYERS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=12)
MODELS = {
    "softcap": ("Gemma2", dict(LAYERS, attn_logit_softcapping=2.0, attn_implementation="eager")),
    "sinks": ("GptOss", dict(LAYERS, num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager")),
    "a bias by head and key": ("Bloom", dict(n_head=4, n_layer=2)),
    "a window over a padded batch": ("Mistral", dict(sliding_window=12)),
}


SLOW = ("sinks", "a window over a padded batch")


@pytest.mark.parametrize("what", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_tokens_are_the_models_own(what):
    transformers = pytest.importorskip("transformers")
    torch._dynamo.reset()
    torch.manual_seed(0)
    family, settings = MODELS[what]
    config = getattr(transformers, f"{family}Config")(**{**TINY, "eos_token_id": None, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = token_ids(20, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    given = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
    want = model.generate(ids, **given)
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()), compiler="eager")
    assert torch.equal(model.generate(ids, **given), want)
    steps = [s for s in tsa.report(model).sites if s.q_len == "1"]
    assert steps
    assert {s.policy for s in steps if s.replaced} == {"Exact"}
    assert not [s.reason for s in steps if not s.replaced]
