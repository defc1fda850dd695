"""`transform(front="interface")`: the sites of a trace, without a graph; taken by itself where hooks break graphs."""

from __future__ import annotations

import copy

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids

transformers = pytest.importorskip("transformers")
SPARSE = tsa.TokenSparse(coverage=0.6, window=16, min_tokens=32, completion=None)


def llama():
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=2)


def padded(batch=2, length=300, padding=40):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, :padding] = 0
    return dict(input_ids=token_ids(length, batch), attention_mask=mask, use_cache=False)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def spread(model):
    """With a hook of accelerate on each layer, as `device_map` over several devices has it."""
    accelerate = pytest.importorskip("accelerate")
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    names += [f"model.layers.{n}" for n in range(len(model.model.layers))]
    return accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True)


def modules(report):
    return [(s.module, s.policy, s.replaced) for s in report.sites]


@pytest.mark.parametrize("policy", [SPARSE, tsa.BlockSparse(0.5, window=64, last_dense=0)], ids=["tokens", "blocks"])
def test_the_same_sites_and_logits_as_by_a_trace(policy):
    inputs, plan = padded(), tsa.Plan(policy, rules=[("model.layers.1.*", "prefill", tsa.Dense())])
    traced, ours = (tsa.transform(llama(), plan, front=front) for front in ("trace", "interface"))
    torch.testing.assert_close(logits(ours, inputs), logits(traced, inputs), rtol=1e-4, atol=1e-5)
    assert modules(tsa.report(ours)) == modules(tsa.report(traced))
    assert [s.replaced for s in tsa.report(ours).sites] == [True, False]
    assert "1 of 2 attention sites replaced by the attention interface" in str(tsa.report(ours))


def test_layers_on_several_devices_are_taken_by_the_interface():
    """Their masks reach the layers as data: a trace proves none of them, and takes many graphs."""
    inputs = padded()
    want = logits(tsa.transform(llama(), SPARSE), inputs)
    by_trace = tsa.transform(spread(llama()), SPARSE, front="trace")
    logits(by_trace, inputs)
    assert tsa.report(by_trace).graphs > 4
    assert not tsa.report(by_trace).replaced
    ours = tsa.transform(spread(llama()), SPARSE)
    torch.testing.assert_close(logits(ours, inputs), want, rtol=1e-4, atol=1e-5)
    assert tsa.report(ours).front == "interface"
    assert len(tsa.report(ours).replaced) == len(ours.model.layers)


def test_restore_and_copies_are_dense():
    inputs, model = padded(), llama()
    dense = logits(model, inputs)
    own = model.config._attn_implementation
    tsa.transform(model, SPARSE, front="interface")
    assert not torch.allclose(logits(model, inputs), dense, atol=1e-4)
    torch.testing.assert_close(logits(copy.deepcopy(model), inputs), dense, rtol=1e-4, atol=1e-5)
    tsa.restore(model)
    assert torch.equal(logits(model, inputs), dense)
    assert model.config._attn_implementation == own
    with pytest.raises(ValueError, match="was not transformed"):
        tsa.report(model)


def test_generate_keeps_its_decode_steps():
    model, ids = llama(), token_ids(60)
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    tsa.transform(model, tsa.TokenSparse(coverage=0.0), front="interface")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), want)
    assert [s.q_len for s in tsa.report(model).sites] == ["60"] * len(model.model.layers)
    model(input_ids=token_ids(70), use_cache=False)
    assert {s.q_len for s in tsa.report(model).replaced} <= {"any", "60"}


def test_what_cannot_be_honoured_is_an_error():
    model = llama()
    with pytest.raises(ValueError, match="front must be one of"):
        tsa.transform(model, SPARSE, front="graph")
    with pytest.raises(ValueError, match="makes no graphs"):
        tsa.transform(model, SPARSE, front="interface", compiler="inductor")
    with pytest.raises(ValueError, match="no decode steps"):
        tsa.transform(model, tsa.Plan(SPARSE, decode=tsa.Exact()), front="interface")
    with pytest.raises(ValueError, match="no transformers model"):
        tsa.transform(torch.nn.Linear(2, 2), SPARSE, front="interface")
    with pytest.raises(ValueError, match="no module of the model matches"):
        tsa.transform(model, tsa.Plan(SPARSE, rules=[("nothing.*", "prefill", tsa.Dense())]), front="interface")
    tsa.transform(model, SPARSE, front="interface")
    for again in ("trace", "interface"):
        with pytest.raises(RuntimeError, match="restore"):
            tsa.transform(model, SPARSE, front=again)
