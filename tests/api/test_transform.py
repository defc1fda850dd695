"""`transform` on a real Llama: what is replaced, what stays working, how it is undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, SPARSE, tiny_llama, token_ids


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def two_layers():
    return tiny_llama(num_hidden_layers=2)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def test_every_layer_is_replaced_and_exact_at_coverage_0(two_layers):
    ids = token_ids(50, batch=2)
    dense = logits(two_layers, ids)
    assert tsa.transform(two_layers, KEEP_ALL) is two_layers
    torch.testing.assert_close(logits(two_layers, ids), dense, atol=1e-4, rtol=1e-4)
    report = tsa.report(two_layers)
    assert [s.replaced for s in report.sites] == [True] * 2
    assert [s.layer for s in report.sites] == [0, 1]
    assert report.sites[1].module.endswith("layers.1.self_attn")


def test_sparse_differs_and_restore_brings_dense_back(model):
    ids = token_ids(80)
    dense = logits(model, ids)
    tsa.transform(model, SPARSE)
    assert (logits(model, ids) - dense).abs().max() > 1e-4
    assert tsa.restore(model) is model
    torch.testing.assert_close(logits(model, ids), dense, atol=0, rtol=0)
    with pytest.raises(ValueError, match="was not transformed"):
        tsa.report(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gets_what_it_gets_alone(model, side):
    tsa.transform(model, SPARSE)
    long, short = token_ids(60), token_ids(40)
    pad = torch.zeros(1, 20, dtype=torch.long)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    ids = torch.cat([long, row])
    mask = (ids != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(model, ids, attention_mask=mask, position_ids=positions)
    real = slice(20, 60) if side == "left" else slice(0, 40)
    assert all(s.replaced for s in tsa.report(model).sites)
    torch.testing.assert_close(together[0], logits(model, long)[0], atol=1e-4, rtol=1e-4)
    if side == "left":  # padding on the right: the last queries, which score, are padding
        torch.testing.assert_close(together[1, real], logits(model, short)[0], atol=1e-4, rtol=1e-4)


def test_generate_prefills_sparse_and_decodes_dense(model):
    ids = token_ids(40)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    tsa.transform(model, KEEP_ALL)
    actual = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(actual, expected)
    report = tsa.report(model)  # decode steps run the model as it is, untraced
    assert (report.graphs, len(report.replaced), len(report.dense)) == (1, 1, 0)


@pytest.mark.slow  # by Inductor
def test_decode_steps_are_compiled_where_the_user_asks_for_it(model):
    ids, options = token_ids(40), dict(max_new_tokens=4, do_sample=False)
    expected = model.generate(ids, **options)
    tsa.transform(model, KEEP_ALL, compiler="inductor")
    assert torch.equal(model.generate(ids, **options), expected)
    assert {s.reason for s in tsa.report(model).dense} == {"decode step: one query"}


def test_generate_compiles_its_decode_steps_itself(model):
    """As it does on GPUs with a static cache."""
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    ids, options = token_ids(40), dict(max_new_tokens=6, do_sample=False, cache_implementation="static", compile_config=config)
    expected = model.generate(ids, **options)
    tsa.transform(model, KEEP_ALL)
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(tsa.report(model).replaced) == 1


def test_ten_lengths_take_two_graphs(model):
    tsa.transform(model, SPARSE)
    for length in range(40, 140, 10):
        logits(model, token_ids(length), use_cache=False)
    assert tsa.report(model).graphs <= 2
    assert all(s.replaced for s in tsa.report(model).sites)


@pytest.mark.slow
def test_many_kinds_of_calls_stay_sparse(model):
    """More graphs than Dynamo's usual limit of 8."""
    tsa.transform(model, SPARSE)
    calls = [(batch, cache, padded) for batch in (1, 2) for cache in (False, True) for padded in (False, True)]
    for batch, use_cache, padded in calls:
        for length in (40, 50):
            ids = token_ids(length, batch)
            mask = torch.ones_like(ids)
            mask[0, : 5 * padded] = 0
            logits(model, ids, use_cache=use_cache, attention_mask=mask if padded else None)
            model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    graphs = tsa.report(model).graphs
    assert graphs > 8
    logits(model, token_ids(60), logits_to_keep=3)
    assert tsa.report(model).graphs > graphs
    assert all(s.replaced for s in tsa.report(model).sites[-1:])


def test_state_dict_and_to_work(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    tsa.transform(model, SPARSE)
    assert model.state_dict().keys() == before.keys()
    model.load_state_dict(before)
    model.to(torch.bfloat16)
    assert logits(model, token_ids(40)).dtype == torch.bfloat16
    assert len(tsa.report(model).replaced) == 1


def test_a_pickle_and_a_copy_are_dense(model):
    ids = token_ids(40)
    dense = logits(model, ids)
    tsa.transform(model, SPARSE)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(logits(other, ids), dense)
        with pytest.raises(ValueError, match="was not transformed"):
            tsa.report(other)


def test_two_models_of_one_class_do_not_share_graphs():
    one, other = tiny_llama(), tiny_llama()
    tsa.transform(one, KEEP_ALL)
    tsa.transform(other, tsa.Dense())
    for m in (one, other):
        logits(m, token_ids(40))
    assert len(tsa.report(one).replaced) == 1
    assert len(tsa.report(other).replaced) == 0
    assert tsa.report(other).sites[0].reason


def test_a_plan_chooses_layers(two_layers):
    tsa.transform(two_layers, tsa.Plan(tsa.Dense(), rules=[("model.layers.1.*", "prefill", SPARSE)]))
    logits(two_layers, token_ids(60))
    assert [s.replaced for s in tsa.report(two_layers).sites] == [False, True]


def test_gradients_run_dense_and_flow(model):
    tsa.transform(model, SPARSE)
    model(input_ids=token_ids(40)).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert "gradients" in tsa.report(model).sites[0].reason


def test_explain_leaves_the_model_alone(two_layers):
    ids = token_ids(40)
    report = tsa.explain(two_layers, input_ids=ids, policy=SPARSE)
    assert len(report.replaced) == 2
    assert two_layers._compiled_call_impl is None
    assert "layers.1.self_attn" in str(report)


def test_a_model_with_attention_nobody_reads_warns(caplog):
    class Odd(nn.Module):
        def forward(self, x):
            scores = (x @ x.mT).masked_fill(torch.ones(x.shape[-2], x.shape[-2]).triu(1).bool(), -1e9)
            return scores.softmax(-1) @ x  # five dimensions

    odd = tsa.transform(Odd())
    with torch.no_grad():
        odd(torch.randn(1, 2, 3, 8, 4))
    assert "not recognised" in tsa.report(odd).warnings[0]
    assert "not recognised" in caplog.text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: tsa.transform(print), TypeError, "takes a torch.nn.Module, got builtin"),
        (lambda m: tsa.transform(m, 0.05), TypeError, "expected a policy, a plan"),
        (lambda m: tsa.transform(m, {"policy": "Nope"}), ValueError, "unknown policy 'Nope'"),
        (lambda m: tsa.transform(m, compiler="fast"), ValueError, "compiler must be one of"),
        (lambda m: tsa.transform(m, inductor_options={"max_autotune": True}), ValueError, "takes no Inductor options"),
        (lambda m: tsa.transform(tsa.transform(m)), RuntimeError, "compiled already"),
        (lambda m: tsa.restore(m), ValueError, "was not transformed"),
    ],
)
def test_wrong_use_is_a_clear_error(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


def test_prefill_in_chunks_with_a_cache(model):
    """Each chunk is attention with Lq < Lk; later chunks share one dynamic graph."""
    from transformers import DynamicCache

    ids = token_ids(96)
    dense = logits(model, ids)
    tsa.transform(model, KEEP_ALL)
    cache = DynamicCache()
    parts = [logits(model, ids[:, i : i + 24], past_key_values=cache, use_cache=True) for i in range(0, 96, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), dense, atol=1e-4, rtol=1e-4)
    report = tsa.report(model)
    assert report.graphs == 3  # no past; static past; any past
    assert not report.dense, report


def test_a_peft_wrapper_also_generates_sparse(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids, options = token_ids(40), dict(max_new_tokens=3, do_sample=False)
    expected, expected_logits = wrapped.generate(input_ids=ids, **options), logits(wrapped, ids)
    assert tsa.transform(wrapped, KEEP_ALL) is wrapped
    assert torch.equal(wrapped.generate(input_ids=ids, **options), expected)
    assert len(tsa.report(wrapped).replaced) == 1
    torch.testing.assert_close(logits(wrapped, ids), expected_logits, atol=1e-5, rtol=1e-5)
    tsa.restore(wrapped)
    assert wrapped.get_base_model()._compiled_call_impl is None


def test_layers_keep_their_numbers_in_graphs_of_their_own(two_layers):
    """accelerate's hooks (device_map over several devices) break the graph at each layer."""
    hooks = pytest.importorskip("accelerate.hooks")
    for layer in two_layers.model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    tsa.transform(two_layers, tsa.Plan(tsa.Dense(), rules=[(1, "prefill", KEEP_ALL)]))
    logits(two_layers, token_ids(40))
    sites = tsa.report(two_layers).sites
    assert [(s.layer, s.module, s.policy) for s in sites] == [
        (0, "model.layers.0.self_attn", "Dense"),
        (1, "model.layers.1.self_attn", "TokenSparse"),
    ]


def test_a_report_before_any_call_says_what_to_do(model):
    assert "nothing was traced yet" in str(tsa.report(tsa.transform(model)))
