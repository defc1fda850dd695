"""Checkpoints of SDAR and LLaDA, tiny and random: loaded by transformers' models, run by the cache, block by block."""

from __future__ import annotations

import json

import pytest
import torch

import tsa_compile as tsa
from tsa_compile.generate.block_cache import BlockCache
from tsa_compile.generate.diffusion import diffuse
from tsa_compile.tools.diffusion.model import training_mask

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from safetensors.torch import save_file

from tsa_compile.generate import checkpoints, families

SDAR = dict(
    model_type="sdar", architectures=["SDARForCausalLM"], auto_map={"AutoConfig": "configuration_sdar.SDARConfig"},
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=128, attention_bias=False, sliding_window=None,
    use_sliding_window=False, tie_word_embeddings=False, mask_token_id=49, block_size=4, hidden_act="silu",
    torch_dtype="bfloat16",
)  # fmt: skip
LLADA = dict(
    model_type="llada", d_model=32, mlp_hidden_size=48, n_layers=2, n_heads=4, n_kv_heads=4, max_sequence_length=128,
    rms_norm_eps=1e-5, rope_theta=500000.0, vocab_size=50, embedding_size=56, weight_tying=False, mask_token_id=49, alibi=False,
    attention_layer_norm=False, block_type="llama", include_bias=False, include_qkv_bias=False, input_emb_norm=False,
    layer_norm_type="rms", activation_type="silu", scale_logits=False, rope=True,
)  # fmt: skip
OLD = {  # transformers' name, LLaDA's: the reverse of what is tested
    "model.embed_tokens": "model.transformer.wte", "model.norm": "model.transformer.ln_f", "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm", "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out", "self_attn.": "",
    "model.layers": "model.transformer.blocks",
}  # fmt: skip


def write(folder, config):
    """A folder as the hub has it, and the transformers model that its weights are of."""
    kind, sizes = families.described(config)
    model = kind(sizes).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        for new, old in OLD.items() if config["model_type"] == "llada" else ():
            name = name.replace(new, old)
        weights[name] = tensor.clone()
    save_file(weights, folder / "model-00001-of-00001.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("config", [SDAR, LLADA], ids=["sdar", "llada"])
def test_a_checkpoint_runs_block_by_block_as_its_own_model_by_a_block_causal_mask(config, tmp_path):
    want = write(tmp_path, config)
    found = checkpoints.load(tmp_path, torch.float32, "cpu")
    assert found.sampling == families.Sampling(49, block=4 if config is SDAR else 32)
    ids, block = torch.randint(49, (2, 24)), 4
    mask = training_mask(24, block)[24:, 24:].expand(2, 1, -1, -1)
    with torch.no_grad():
        expected = want(input_ids=ids, attention_mask=mask, use_cache=False).logits
        cache, parts = BlockCache(tsa.Plan(), block, 24), []
        for start in range(0, 24, 8):
            cache.begin("prefill", 8)
            parts.append(found.model(ids[:, start : start + 8], cache.positions(8, ids.device), cache))
            cache.commit(8)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    base = want.config.rope_parameters["rope_theta"] if hasattr(want.config, "rope_parameters") else want.config.rope_theta
    assert base == config["rope_theta"]


def test_remembered_keys_in_a_checkpoint(tmp_path):
    write(tmp_path, SDAR)
    found = checkpoints.load(tmp_path, torch.float32, "cpu")
    ids = torch.randint(49, (2, 20))
    dense = found.diffuse(ids, 8)
    assert not (dense.ids == 49).any()
    assert torch.equal(diffuse(found.model, ids, 8, mask_id=49, block=4).ids, dense.ids)
    whole = found.diffuse(ids, 8, plan=tsa.Remembered("denoise_first", keys=512))
    assert torch.equal(whole.ids, dense.ids)
    some = found.diffuse(ids, 8, plan=tsa.Remembered("denoise_first", keys=4))
    assert some.sparse_share == pytest.approx(1 / 3)
    assert some.never_bit == 0


def test_every_name_of_llada_is_known():
    kind, sizes = families.described(LLADA)
    made = kind(sizes)
    for name, tensor in made.state_dict().items():
        given = name
        for new, theirs in OLD.items():
            given = given.replace(new, theirs)
        assert given != name
        assert list(families.renamed({given: tensor}, LLADA)) == [name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "dream"}, "model_type must be one of .*'llada', 'llada2_moe', 'sdar'.*, got 'dream'"),
        (LLADA | {"alibi": True}, "'llada' with {'alibi': True} is not taken"),
        (SDAR | {"use_sliding_window": True}, "'sdar' with {'use_sliding_window': True} is not taken"),
    ],
)
def test_what_is_not_taken_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        families.described(config)


def test_missing_weights_are_an_error(tmp_path):
    write(tmp_path, SDAR | {"num_hidden_layers": 2})
    (tmp_path / "config.json").write_text(json.dumps(SDAR))
    with pytest.raises(ValueError, match="weights missing"):
        checkpoints.load(tmp_path, torch.float32, "cpu")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        checkpoints.load(tmp_path, torch.float32, "cpu")


def test_the_model_runs_under_the_loop_alone(tmp_path):
    write(tmp_path, SDAR)
    model = checkpoints.load(tmp_path, torch.float32, "cpu").model
    with pytest.raises(RuntimeError, match=r"runs under generate\.diffusion\.diffuse alone"):
        model.model(input_ids=torch.zeros(1, 4, dtype=torch.long))
