"""A plan with a decode policy: decode steps go through the passes; without one they are the model's own."""

import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama, token_ids


def generate(model, ids):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=6, do_sample=False)


def test_decode_steps_run_the_named_policy_and_give_dense_tokens():
    model, ids = tiny_llama(), token_ids(40)
    dense = generate(model, ids)
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))
    assert torch.equal(generate(model, ids), dense)
    steps = [site for site in tsa.report(model).sites if site.q_len == "1"]
    assert steps
    assert all(site.replaced and site.policy == "Exact" for site in steps), tsa.report(model)


def test_decode_steps_without_a_policy_are_the_models_own():
    model = tsa.transform(tiny_llama(), tsa.Plan(prefill=tsa.Dense()))
    generate(model, token_ids(40))
    assert {site.q_len for site in tsa.report(model).sites} == {"any"}
    rules = [("model.layers.0.*", "decode", tsa.Exact())]
    assert tsa.Plan(rules=rules).decodes
    assert not tsa.Plan(decode=tsa.Dense()).decodes
