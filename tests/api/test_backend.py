"""`torch.compile(model, backend="tsa")`: options, one graph, Inductor underneath, the compile cache key."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, SPARSE, tiny_llama, token_ids
from tsa_compile.backend import Backend
from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.base import Policy


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def operands(length: int = 40):
    return tuple(torch.randn(1, 2, length, 16) for _ in range(3))


def run(function, *args, **compile_options):
    with torch.no_grad():
        return torch.compile(function, backend="tsa", **compile_options)(*args)


def test_the_backend_is_listed():
    assert "tsa" in torch._dynamo.list_backends()


@pytest.mark.parametrize("compiler", ["inductor", "eager"])
def test_llama_prefill_is_one_graph(compiler):
    model, ids = tiny_llama(), token_ids(48)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="tsa", fullgraph=True, options={"compiler": compiler, "policy": KEEP_ALL})
        sparse = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(sparse, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"coverage": 0.3, "window": 8, "pool": 3, "min_tokens": 8},
        {"policy": {"policy": "TokenSparse", "coverage": 0.3, "window": 8, "pool": 3, "min_tokens": 8}},
        {"policy": Plan(tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8)).to_dict()},
    ],
    ids=["fields", "policy", "plan"],
)
def test_all_ways_to_name_a_policy_agree(options):
    args = operands()
    expected = Backend(as_plan(tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8)), "eager")
    torch.testing.assert_close(
        run(attention, *args, options={"compiler": "eager", **options}), _through(expected, *args), atol=0, rtol=0
    )
    assert len(expected.report.replaced) == 1


def _through(backend, *args):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(attention, backend=backend)(*args)


def test_inductor_options_and_modes_pass_through():
    args = operands()
    expected = attention(*args)
    torch.testing.assert_close(run(attention, *args, options={"coverage": 0.0, "max_autotune": False}), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(run(attention, *args, mode="reduce-overhead"), expected)  # short rows run dense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverag": 0.1}, "unknown option 'coverag'"),
        ({"coverage": 2}, r"TokenSparse.coverage must be a number in \[0, 1\), got 2"),
        ({"coverage": 0.1, "policy": SPARSE}, "either a policy or its fields"),
        ({"compiler": "gcc"}, "compiler must be one of"),
        ({"policy": 3}, "expected a policy"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(Exception, match=message):
        run(attention, *operands(), options=options)


def test_the_plan_enters_the_cache_key(monkeypatch):
    tags = []

    def recording(gm, inputs, config_patches=None):
        tags.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", recording)
    for coverage in (0.1, 0.2, 0.1):
        _through(Backend(as_plan(tsa.TokenSparse(coverage=coverage))), *operands())
    assert tags[0] == tags[2] != tags[1]
    assert "tsa:" in tags[0]
    assert torch.compiler.config.cache_key_tag == ""  # the user's own is left as it was


def test_a_policy_cannot_be_a_bare_class():
    with pytest.raises(TypeError, match="expected a policy"):
        as_plan(Policy)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dynamic_true_replaces_too(implementation):
    """Dynamo then makes the scale an input; another scale is another graph."""
    model = tiny_llama(attn_implementation=implementation)
    backend = Backend(Plan(KEEP_ALL), "eager")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    scales = [layer.self_attn.scaling for layer in model.model.layers]
    with torch.no_grad():
        for length, factor in ((40, 1), (50, 1), (50, 2)):
            for layer, scale in zip(model.model.layers, scales, strict=True):
                layer.self_attn.scaling = scale * factor
            ids = token_ids(length)
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert backend.report.graphs == 2
    assert len(backend.report.replaced) == len(backend.report.sites) == 2
