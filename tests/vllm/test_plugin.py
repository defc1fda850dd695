"""The plug-in without an engine: options, versions, which layers are sparse, how a batch is told apart."""

from __future__ import annotations

import types

import pytest
import torch

import tsa_compile as tsa
from tsa_compile.frontends.vllm import layers
from tsa_compile.frontends.vllm.options import check_arguments, check_model, read
from tsa_compile.frontends.vllm.plugin import supported


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("0.25.2", False),
        ("0.26.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1", True),
        ("0.34.0", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_versions(version, known):
    assert supported(version) is known


def test_options():
    assert read({}).plan.prefill == read({"tsa": {}}).plan.prefill == tsa.BlockSparse()
    named = read({"tsa": {"policy": "BlockSparse", "alpha": 0.2, "min_context": 7}})
    assert (named.plan.prefill, named.min_context) == (tsa.BlockSparse(alpha=0.2), 7)
    rule = {"modules": "model.layers.0.*", "phase": "prefill", "policy": {"policy": "Dense"}}
    plan = read({"tsa": {"phases": {"prefill": {"policy": "TokenSparse"}}, "rules": [rule]}}).plan
    assert plan.policy_at("model.layers.0.self_attn", "prefill") == tsa.Dense()
    assert plan.policy_at("model.layers.1.self_attn", "prefill") == tsa.TokenSparse()


def test_decode_by_pages():
    plan = read({"tsa": {"policy": "PageSparse", "keep": 0.1}}).plan
    assert (plan.prefill, plan.decode, plan.draft) == (tsa.BlockSparse(), tsa.PageSparse(keep=0.1), None)
    both = decided([Attention(), Attention(sliding_window=9)], {"policy": "PageSparse", "keep": 0.1})
    assert [x.decode for x in both] == [tsa.PageSparse(keep=0.1), None]
    assert layers.table(both).splitlines()[0].endswith("sparse  BlockSparse(); decode PageSparse(keep=0.1)")
    config = types.SimpleNamespace(**vars(CONFIG), kv_transfer_config=object())
    assert decided([Attention()], {"policy": "PageSparse", "keep": 0.1}, config)[0].decode is None


def test_a_plan_in_a_file(tmp_path):
    path = tmp_path / "plan.json"
    tsa.Plan(prefill=tsa.BlockSparse(alpha=0.3)).save(path)
    assert read({"tsa": {"plan": str(path)}}).plan.prefill == tsa.BlockSparse(alpha=0.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alhpa": 0.1}, "tsa has no option 'alhpa'; its options are"),
        ({"policy": "BlockSparse", "alhpa": 0.1}, "BlockSparse has no field 'alhpa'"),
        ({"policy": "Sparse"}, "unknown policy 'Sparse'"),
        ({"policy": "BlockSparse", "alpha": 2}, r"alpha must be a number in \[0, 1\)"),
        ({"phases": {"draft": {"policy": "PageSparse", "keep": 0.1}}}, "in vLLM draft is not told apart, got PageSparse"),
        ({"phases": {"decode": {"policy": "Remembered", "source": "verify"}}}, "Remembered"),
        ({"min_context": -1}, "min_context must be an int >= 0"),
        ({"where": "pays"}, "tsa.where must be 'always'"),
        ({"plan": "nowhere.json"}, "tsa.plan: .*nowhere.json"),
        ({"plan": "nowhere.json", "rules": []}, "leave out 'rules'"),
    ],
)
def test_a_wrong_option_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        read({"tsa": given})


def test_options_without_the_backend_and_models_that_it_cannot_serve():
    arguments = types.SimpleNamespace(additional_config={"tsa": {}}, attention_backend="FLASH_ATTN", attention_config=None)
    with pytest.raises(ValueError, match="add --attention-backend CUSTOM"):
        check_arguments(arguments)
    arguments.attention_backend = "CUSTOM"
    check_arguments(arguments)
    backend = types.SimpleNamespace(backend=types.SimpleNamespace(name="CUSTOM"))
    config = types.SimpleNamespace(attention_config=backend, model_config=types.SimpleNamespace(use_mla=True))
    with pytest.raises(ValueError, match="MLA, which backend CUSTOM does not serve"):
        check_model(config)
    config.model_config.use_mla = False
    check_model(config)


class Attention:
    """As vLLM's layer, with what decisions read."""

    def __init__(self, impl=None, **changes):
        self.num_heads, self.num_kv_heads, self.head_size, self.dtype = 8, 2, 64, torch.bfloat16
        self.sliding_window, self.attn_type, self.kv_cache_dtype = None, "decoder", "auto"
        self.impl = types.SimpleNamespace(**{"tsa": None, "scale": 0.125, "logits_soft_cap": 0, **(impl or {})})
        vars(self).update(changes)


class CrossAttention(Attention):
    pass


CONFIG = types.SimpleNamespace(
    parallel_config=types.SimpleNamespace(pipeline_parallel_size=1), model_config=types.SimpleNamespace()
)


def decided(attentions, options=None, config=CONFIG):
    named = {f"model.layers.{i}.self_attn.attn": layer for i, layer in enumerate(attentions)}
    return list(layers.decide(named, read({"tsa": options or {}}), config, torch.device("cpu")).values())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Attention(sliding_window=512), "sliding window of 512: already local"),
        (Attention({"sinks": torch.zeros(8)}), "attention with sinks"),
        (Attention({"logits_soft_cap": 50.0}), "softcap of 50.0"),
        (Attention({"alibi_slopes": [0.5]}), "ALiBi"),
        (Attention(kv_cache_dtype="fp8_e4m3"), "cache in fp8_e4m3"),
        (Attention(attn_type="encoder_only"), "encoder_only attention: no causal mask"),
        (Attention(kv_sharing_target_layer_name="model.layers.3"), "reads the keys of another layer"),
        (Attention(head_size=512), "head dim 512 is above 256"),
        (CrossAttention(), "a layer of vLLM's class CrossAttention"),
    ],
)
def test_a_layer_that_stays_dense_says_why(layer, reason):
    plain, special = decided([Attention(), layer])
    assert (plain.policy, plain.reason) == (tsa.BlockSparse(), "")
    assert special.policy is None
    assert reason in special.reason


def test_a_layer_of_another_backend_and_whole_engines():
    other = Attention()
    del other.impl.tsa
    assert decided([other])[0].reason.startswith("served by another backend")
    config = types.SimpleNamespace(
        parallel_config=CONFIG.parallel_config, model_config=types.SimpleNamespace(is_mm_prefix_lm=True)
    )
    assert decided([Attention()], config=config)[0].reason.startswith("images are attended to in both directions")


def test_rules_name_layers_by_path_or_number():
    rule = {"phase": "prefill", "policy": {"policy": "Dense"}}
    for modules in ("model.layers.[01].*", "model.layers.[01].self_attn"):
        got = decided([Attention()] * 3, {"rules": [{"modules": modules, **rule}]})
        assert [x.reason for x in got] == ["policy is Dense", "policy is Dense", ""]
    assert [bool(x.policy) for x in decided([Attention()] * 2, {"rules": [{"modules": 1, **rule}]})] == [True, False]
    with pytest.raises(ValueError, match="plan rule 0: no module of the model matches 'decoder"):
        decided([Attention()], {"rules": [{"modules": "decoder.*", **rule}]})


def test_the_table_joins_layers_with_the_same_answer():
    attentions = [Attention(), Attention(), Attention(sliding_window=512)]
    assert layers.table(decided(attentions, {"policy": "BlockSparse", "alpha": 0.2})).splitlines() == [
        "  model.layers.0.self_attn to model.layers.1.self_attn  sparse  BlockSparse(alpha=0.2)",
        "  model.layers.2.self_attn                              dense   sliding window of 512: already local",
    ]
