"""`attn_implementation="tsa"`: equal to dense at coverage 0, to `transform` above, and dense with a reason for all the rest."""

from __future__ import annotations

import logging

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import KEEP_ALL, SPARSE, token_ids

transformers = pytest.importorskip("transformers")
from tsa_compile.frontends import hf  # noqa: E402
from tsa_compile.interface import attention  # noqa: E402
from tsa_compile.interface.mask import shaped_mask  # noqa: E402

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=1,
)
LAYERS = ["full_attention", "sliding_attention"]


def model(name: str):
    """(model, how many of its two layers can be sparse)"""
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), 2
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)), 2
    if name == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=16)), 0
    if name == "gemma3":
        config = transformers.Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=LAYERS)
        return transformers.Gemma3ForCausalLM(config), 1
    if name == "gemma2":
        config = transformers.Gemma2Config(**SIZES, sliding_window=16, layer_types=LAYERS, attn_logit_softcapping=2.0)
        return transformers.Gemma2ForCausalLM(config), 0
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": LAYERS, "sliding_window": 16}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)), 0


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    torch._dynamo.reset()
    attention._log_once.cache_clear()
    hf.register(KEEP_ALL, "tsa")
    hf.register(SPARSE, "tsa-sparse")


@pytest.fixture
def calls(monkeypatch):
    """How many attentions went through an operator."""
    seen = []
    plain = attention._sparse

    def counted(front, module, *args):
        out = plain(front, module, *args)
        if out is not None:
            seen.append(getattr(module, "layer_idx", None))
        return out

    monkeypatch.setattr(attention, "_sparse", counted)
    return seen


def batch(side: str):
    """Two rows of 50 tokens, the second with 15 of padding: ids, mask, positions of a padded batch; None: no mask."""
    ids = token_ids(50, 2)
    if side == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(m, implementation, inputs, **kwargs):
    m.set_attn_implementation(implementation)
    out = m(**inputs, **kwargs).logits
    return out if "attention_mask" not in inputs else out[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "gemma2", "gpt-oss"])
def test_equal_to_dense_at_coverage_0(name, side, calls):
    m, layers = model(name)
    m.eval()
    inputs = batch(side)
    expected = logits(m, "eager" if name in ("gemma2", "gpt-oss") else "sdpa", inputs)
    actual = logits(m, "tsa", inputs)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == layers


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_equal_to_transform_above_0(name, side, calls):
    m = model(name)[0].eval()
    inputs = batch(side)
    dense = logits(m, "sdpa", inputs)
    actual = logits(m, "tsa-sparse", inputs)
    assert calls
    m.set_attn_implementation("sdpa")
    expected = logits(tsa.transform(m, SPARSE), "sdpa", inputs)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (actual - dense).abs().max() > 1e-4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_generate(name, cache, calls):
    m, layers = model(name)
    m.eval()
    inputs = batch("left")
    inputs.pop("position_ids")
    options = dict(max_new_tokens=5, do_sample=False, cache_implementation=cache, disable_compile=True)
    m.set_attn_implementation("sdpa")
    expected = m.generate(**inputs, **options)
    m.set_attn_implementation("tsa")
    assert torch.equal(m.generate(**inputs, **options), expected)
    assert len(calls) == layers  # the prefill, and no decode step


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks(cache, calls):
    m = model("llama")[0].eval()
    ids = token_ids(48)
    dense = logits(m, "sdpa", {"input_ids": ids})
    m.set_attn_implementation("tsa")
    past = transformers.DynamicCache() if cache == "dynamic" else transformers.StaticCache(m.config, max_cache_len=64)
    with torch.no_grad():
        parts = [m(input_ids=ids[:, i : i + 24], past_key_values=past).logits for i in range(0, 48, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), dense, atol=1e-4, rtol=1e-4)
    assert len(calls) == 4


def reasons(caplog, m, inputs, grad=False, **kwargs):
    m.set_attn_implementation("tsa")
    with torch.set_grad_enabled(grad), caplog.at_level(logging.INFO, "tsa_compile"):
        m(**inputs, **kwargs)
        m(**inputs, **kwargs)
    texts = [r.getMessage() for r in caplog.records if "stays dense" in r.getMessage()]
    assert len(texts) == len(set(texts))  # once each
    return "; ".join(texts)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma2", "attention with softcap"), ("gpt-oss", "attention with s_aux"), ("mistral", "attention with sliding_window")],
)
def test_the_reason_is_logged_once(name, reason, caplog, calls):
    assert reason in reasons(caplog, model(name)[0].eval(), batch("left"))
    assert not calls


def test_a_mask_of_the_users_own_stays_dense(caplog, calls):
    """A 4-d mask reaches the attention as it is."""
    m = model("llama")[0].eval()
    mask = torch.ones(50, 50, dtype=torch.bool).tril()
    mask[20:, 3] = False
    inputs = {"input_ids": token_ids(50), "attention_mask": mask[None, None]}
    with torch.no_grad():
        m.set_attn_implementation("sdpa")
        expected = m(**inputs).logits
        assert "not proven" in reasons(caplog, m, inputs)
        torch.testing.assert_close(m(**inputs).logits, expected)
    assert not calls


def test_packed_sequences_stay_dense(caplog, calls):
    m = model("llama")[0].eval()
    inputs = {"input_ids": token_ids(40), "position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None]}
    expected = logits(m, "sdpa", inputs, use_cache=False)
    torch.testing.assert_close(logits(m, "tsa", inputs, use_cache=False), expected)
    assert not calls


def test_training_stays_dense(caplog, calls):
    m = model("llama")[0]
    m.config.attention_dropout = 0.1
    for layer in m.model.layers:
        layer.self_attn.attention_dropout = 0.1
    inputs = batch("none")
    assert "dropout=0.1" in reasons(caplog, m.train(), inputs)
    assert "gradients" in reasons(caplog, m.eval(), inputs, grad=True)
    assert not calls


def test_a_plan_is_read_by_layer(calls):
    hf.register(tsa.Plan(tsa.Dense(), rules=[(1, "prefill", SPARSE)]), "tsa-plan")
    logits(model("llama")[0].eval(), "tsa-plan", batch("none"))
    assert calls == [1]


def test_a_vision_tower_with_probes(calls):
    hf.register(tsa.ProbeSparse(coverage=0.0, min_keys=1), "tsa-probes")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    m = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=64, patch_size=8)).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = m(pixel_values=image).last_hidden_state
        m.set_attn_implementation("tsa-probes")
        torch.testing.assert_close(m(pixel_values=image).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2


def test_under_torch_compile(calls):
    """The sparse part is a graph break, never a silent change."""
    m = model("llama")[0].eval()
    inputs = batch("left")
    expected = logits(m, "sdpa", inputs)
    m.set_attn_implementation("tsa")
    with torch.no_grad():
        actual = torch.compile(m, backend="eager")(**inputs).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2


def test_wrong_use_is_a_clear_error():
    with pytest.raises(TypeError, match="expected a policy, a plan"):
        hf.register(0.05)


def test_a_chunk_in_which_one_row_is_all_padding():
    """A batch whose second row ends in the first chunk: the first row is what it is alone."""
    m, ids = model("llama")[0].eval(), token_ids(60, 2)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0

    def chunks():
        cache = transformers.DynamicCache()
        return [m(ids[:, i : i + 30], attention_mask=mask[:, : i + 30], past_key_values=cache).logits[:1] for i in (0, 30)]

    with torch.no_grad():
        expected = torch.cat(chunks(), 1)
        m.set_attn_implementation("tsa")
        torch.testing.assert_close(torch.cat(chunks(), 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [2, 16])
def test_few_rows_over_a_cache_are_exact(rows, calls):
    m, ids = model("llama")[0].eval(), token_ids(50 + rows)

    def last():
        cache = transformers.DynamicCache()
        m(ids[:, :50], past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers], [layer.values.clone() for layer in cache.layers]
        return before, m(ids[:, 50:], past_key_values=cache).logits, cache

    with torch.no_grad():
        m.set_attn_implementation("tsa-sparse")
        (keys, values), actual, cache = last()
        assert len(calls) == 2  # the prefill alone
        dense = transformers.DynamicCache()
        for n, (k, v) in enumerate(zip(keys, values, strict=True)):
            dense.update(k, v, n)
        m.set_attn_implementation("sdpa")
        expected = m(ids[:, 50:], past_key_values=dense).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 50 + rows


def test_a_mask_is_read_once(monkeypatch):
    """Whether it hides anything, as transformers' own SDPA mask asks, for all layers; of a decode step we ask nothing."""
    read, padding = [], torch.ones(1, 20, dtype=torch.bool)
    for name in ("__bool__", "__int__", "__float__", "item"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, own=own, name=name: (read.append(name), own(self))[1])
    shaped_mask(1, 16, 20, 4, attention_mask=padding)
    assert read == ["__bool__"]
    shaped_mask(1, 16, 16)
    assert read == ["__bool__"]
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda *args, **kwargs: None)
    shaped_mask(1, 1, 20, 19, attention_mask=padding)
    assert read == ["__bool__"]


def test_nothing_is_read_while_a_cuda_graph_is_captured(monkeypatch):
    """A padding mask is handed on as it is, an offset on the device gives the full mask."""
    padding, offset = torch.ones(1, 20, dtype=torch.bool), torch.tensor(4)
    assert shaped_mask(1, 16, 20, 4, attention_mask=padding).shape == (1, 20)
    monkeypatch.setattr("tsa_compile.interface.mask._captured", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("waits for the device"))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: pytest.fail("waits for the device"))
    assert shaped_mask(1, 16, 20, 4, attention_mask=padding).shape == (1, 20)
    assert shaped_mask(1, 16, 20, offset).shape[-2:] == (16, 20)
