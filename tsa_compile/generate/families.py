"""Published families of block-diffusion checkpoints: which model of transformers each is, and how it is sampled.

But for names and masks SDAR (arXiv 2510.06303) is Qwen3, Fast-dLLM v2 (2509.26328) Qwen2, LLaDA (2502.09992) Llama, and LLaDA 2
(2512.15745) GLM-4.5, a mixture of experts. LLaDA was trained on whole sequences that are read in both directions, so that block
by block, with a cache of the blocks before, is an approximation to it (Fast-dLLM's, 2505.22618); the others were trained so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from tsa_compile.generate.unmask import Sampling

Tensor = torch.Tensor
Config = Mapping[str, Any]  # a checkpoint's config.json

PUBLISHED = {  # sampling as the families' own code has it, by `model_type`; LLaDA's is Fast-dLLM's
    "sdar": Sampling(151669, block=4),
    "llada": Sampling(126336, block=32),
    "llada2_moe": Sampling(156895, block=32, threshold=0.95, stop_id=156892),
    "Fast_dLLM_Qwen": Sampling(151665, block=32, threshold=0.9, part=8, shifted=True, stop_id=151645),
}
NAMES = {  # of weights: in the checkpoint, in transformers' model
    "llada": (
        (r"model\.transformer\.wte\.", "model.embed_tokens."),
        (r"model\.transformer\.ln_f\.", "model.norm."),
        (r"model\.transformer\.ff_out\.", "lm_head."),
        (r"model\.transformer\.blocks\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
        (r"model\.transformer\.blocks\.(\d+)\.ff_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (r"model\.transformer\.blocks\.(\d+)\.([qkv])_proj\.", r"model.layers.\1.self_attn.\2_proj."),
        (r"model\.transformer\.blocks\.(\d+)\.attn_out\.", r"model.layers.\1.self_attn.o_proj."),
        (r"model\.transformer\.blocks\.(\d+)\.ff_proj\.", r"model.layers.\1.mlp.gate_proj."),
        (r"model\.transformer\.blocks\.(\d+)\.up_proj\.", r"model.layers.\1.mlp.up_proj."),
        (r"model\.transformer\.blocks\.(\d+)\.ff_out\.", r"model.layers.\1.mlp.down_proj."),
    ),
    "llada2_moe": (
        (r"model\.word_embeddings\.", "model.embed_tokens."),
        (r"(model\.layers\.\d+)\.attention\.dense\.", r"\1.self_attn.o_proj."),
        (r"(model\.layers\.\d+)\.attention\.query_layernorm\.", r"\1.self_attn.q_norm."),
        (r"(model\.layers\.\d+)\.attention\.key_layernorm\.", r"\1.self_attn.k_norm."),
        (r"(model\.layers\.\d+)\.mlp\.gate\.expert_bias$", r"\1.mlp.gate.e_score_correction_bias"),
    ),
}
FUSED = re.compile(r"(model\.layers\.\d+)\.attention\.query_key_value\.(weight|bias)")  # LLaDA 2's projections
SIZES = {  # of configurations: in the checkpoint, in transformers' model
    "llada": {
        "d_model": "hidden_size", "mlp_hidden_size": "intermediate_size", "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "max_sequence_length": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "weight_tying": "tie_word_embeddings",
    },
    "llada2_moe": {
        "num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts", "use_qkv_bias": "attention_bias",
    } | {
        name: name for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling",
            "partial_rotary_factor", "tie_word_embeddings", "moe_intermediate_size", "num_experts_per_tok", "n_group",
            "topk_group", "routed_scaling_factor", "first_k_dense_replace", "use_qk_norm",
        )
    },
}  # fmt: skip
PLAIN: Mapping[str, Config] = {  # what transformers' model does not have: it must be absent, or as here
    "sdar": {"use_sliding_window": False},
    "Fast_dLLM_Qwen": {"use_sliding_window": False},
    "llada": {
        "alibi": False, "attention_layer_norm": False, "block_type": "llama", "include_bias": False, "include_qkv_bias": False,
        "input_emb_norm": False, "layer_norm_type": "rms", "activation_type": "silu", "scale_logits": False, "rope": True,
    },
    "llada2_moe": {"use_sliding_window": False, "score_function": "sigmoid", "norm_head": False},
}  # fmt: skip
NOT_SIZES = {"model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}


def described(config: Config) -> tuple[Any, Any]:
    """The class of transformers that a checkpoint's configuration describes, and its configuration there.

    Raises:
        ValueError: a family that is not known, or something that the class does not have.
    """
    import transformers as hf

    kind = config.get("model_type")
    if kind not in PUBLISHED:
        raise ValueError(f"model_type must be one of {sorted(PUBLISHED)}, got {kind!r}")
    other = {name: config[name] for name, value in PLAIN[kind].items() if config.get(name, value) != value}
    if other:
        raise ValueError(f"a checkpoint of {kind!r} with {other} is not taken: only { ({n: PLAIN[kind][n] for n in other}) }")
    if kind in SIZES:
        sizes = {to: config[name] for name, to in SIZES[kind].items() if config.get(name) is not None}
    else:
        sizes = {name: value for name, value in config.items() if name not in NOT_SIZES}
    if kind == "sdar":
        return hf.Qwen3ForCausalLM, hf.Qwen3Config(**sizes)
    if kind == "Fast_dLLM_Qwen":
        return hf.Qwen2ForCausalLM, hf.Qwen2Config(**sizes)
    if kind == "llada":
        vocabulary = config.get("embedding_size") or config["vocab_size"]
        return hf.LlamaForCausalLM, hf.LlamaConfig(**sizes, vocab_size=vocabulary)
    own = {"first_k_dense_replace": 0, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "use_qk_norm": True}
    own |= {"norm_topk_prob": config["num_experts_per_tok"] > 1, "num_mtp_layers": 0}
    return hf.Glm4MoeForCausalLM, hf.Glm4MoeConfig(**own | sizes)


def sampling_of(config: Config) -> Sampling:
    """How a checkpoint is sampled: as published, with the configuration's own [MASK] and block."""
    published = PUBLISHED[config["model_type"]]
    block = config.get("block_size") or config.get("bd_size") or published.block
    return dataclasses.replace(published, mask_id=config.get("mask_token_id") or published.mask_id, block=block)


def renamed(weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A checkpoint's weights by the names that transformers has for them, fused projections apart."""
    names = NAMES.get(config["model_type"], ())
    found = {}
    for name, tensor in weights.items():
        fused = FUSED.fullmatch(name)
        if fused is None:
            found[_name(name, names)] = tensor
            continue
        heads = [config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"]]
        rows = [n * tensor.shape[0] // sum(heads) for n in heads]
        for which, own in zip("qkv", tensor.split(rows), strict=True):
            found[f"{fused[1]}.self_attn.{which}_proj.{fused[2]}"] = own
    return found


def _name(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, to in names:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", to, name)
    return name
