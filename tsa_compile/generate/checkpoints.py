"""Block-diffusion checkpoints for `diffuse`: weights of SDAR and LLaDA, run by transformers' own Qwen3 and Llama.

SDAR (arXiv 2510.06303) is Qwen3 that was trained block by block; its weights have Qwen3's names. LLaDA (2502.09992) is Llama
under other names; it was trained on whole sequences that are read in both directions, so that block by block, with a cache of the
blocks before, is an approximation to it (Fast-dLLM's, 2505.22618). The code that lies beside such weights is not run.
"""

from __future__ import annotations

import contextvars
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tsa_compile.generate.block_cache import BlockCache

Tensor = torch.Tensor
_IMPLEMENTATION = "tsa_block_cache"
_cache: contextvars.ContextVar[BlockCache] = contextvars.ContextVar("tsa_block_cache")

LLADA_NAMES = (  # in the checkpoint, in transformers' Llama
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
)
LLADA_SIZES = {  # in the configuration of LLaDA, in Llama's
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "weight_tying": "tie_word_embeddings",
}
LLADA_PLAIN = {  # what Llama does not have: it must be off, or as here
    "alibi": False, "attention_layer_norm": False, "block_type": "llama", "include_bias": False, "include_qkv_bias": False,
    "input_emb_norm": False, "layer_norm_type": "rms", "activation_type": "silu", "scale_logits": False, "rope": True,
}  # fmt: skip
DEFAULTS = {"sdar": (151669, 4), "llada": (126336, 32)}  # [MASK], tokens of a block; SDAR's own, and Fast-dLLM's for LLaDA


class Checkpoint(NamedTuple):
    """What `diffuse` needs of a checkpoint."""

    model: TransformersModel
    mask_id: int
    block: int


class TransformersModel:
    """A causal language model of transformers as a `BlockModel`: its attention is the cache's, in every layer.

    Args:
        model: of a class that takes its attention from transformers' interface, such as Llama, Qwen2 or Qwen3; its attention
            implementation is changed. Its predictions must be of the token at each position itself, and not of the next one.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(_IMPLEMENTATION, _attend)
        AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)
        self.model: Any = model
        set_implementation: Any = model.set_attn_implementation
        set_implementation(_IMPLEMENTATION)

    def __call__(self, ids: Tensor, positions: Tensor, attend: BlockCache) -> Tensor:
        token = _cache.set(attend)
        try:
            found = self.model(input_ids=ids, position_ids=positions.expand(ids.shape[0], -1), use_cache=False).logits
        finally:
            _cache.reset(token)
        assert isinstance(found, Tensor)
        return found


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    cache = _cache.get(None)
    if cache is None:
        raise RuntimeError(f"attention {_IMPLEMENTATION!r} runs under generate.diffusion.diffuse alone")
    special = [n for n in ("softcap", "s_aux", "sliding_window") if options.get(n) is not None]
    if special:
        raise NotImplementedError(f"{type(module).__name__}: attention with {special[0]} in block diffusion")
    layer: Any = module.layer_idx
    return cache(layer, q, k, v, scaling).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **options: Any) -> None:
    return None


def load(folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Checkpoint:
    """A checkpoint of SDAR (dense ones) or LLaDA (8B, 1.5) in a folder: `config.json` and `*.safetensors`.

    Raises:
        ValueError: the configuration is of neither, or has something that Llama or Qwen3 lack; weights are missing or left over.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    model = build(config)
    weights = renamed(_tensors(Path(folder)), config["model_type"])
    if getattr(model.config, "tie_word_embeddings", False):
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(f"{folder}: weights missing {list(missing)[:3]}, left over {list(unexpected)[:3]}")
    mask_id, block = DEFAULTS[config["model_type"]]
    mask_id, block = config.get("mask_token_id") or mask_id, config.get("block_size") or block
    return Checkpoint(TransformersModel(model.to(device, dtype).eval()), mask_id, block)


def build(config: Mapping[str, Any]) -> Any:
    """The transformers model that a checkpoint's configuration describes, with random weights in float32."""
    import transformers

    kind = config.get("model_type")
    if kind == "sdar":
        known = {"model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
        sizes = {name: value for name, value in config.items() if name not in known}
        if sizes.get("use_sliding_window"):
            raise ValueError("an SDAR checkpoint with use_sliding_window is not taken")
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    if kind == "llada":
        other = {name: config[name] for name, value in LLADA_PLAIN.items() if config.get(name, value) != value}
        if other:
            raise ValueError(f"a LLaDA checkpoint with {other} is not taken: Llama has { ({n: LLADA_PLAIN[n] for n in other}) }")
        sizes = {to: config[name] for name, to in LLADA_SIZES.items() if config.get(name) is not None}
        vocabulary = config.get("embedding_size") or config["vocab_size"]
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=vocabulary))
    raise ValueError(f"model_type must be one of {sorted(DEFAULTS)}, got {kind!r}")


def renamed(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A checkpoint's weights by the names that transformers has for them."""
    return {_name(name) if kind == "llada" else name: tensor for name, tensor in weights.items()}


def _name(name: str) -> str:
    for pattern, to in LLADA_NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", to, name)
    return name


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    def read() -> Iterator[tuple[str, Tensor]]:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no dict

    found = dict(read())
    if not found:
        raise ValueError(f"{folder} has no *.safetensors")
    return found
