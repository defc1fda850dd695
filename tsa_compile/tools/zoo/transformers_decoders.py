"""Entries from transformers: causal language models."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tsa_compile.tools.zoo.entries import FLEX, GQA, Entry, causal, hf, ids

MLA: dict[str, Any] = dict(
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
    num_key_value_heads=4, first_k_dense_replace=9, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
MIXED: dict[str, Any] = dict(**GQA, head_dim=16, sliding_window=12, layer_types=["sliding_attention", "full_attention"])


def gpt_neo(implementation: str) -> nn.Module:
    """GPT-Neo's global layers. It has no SDPA; as "sdpa" it gets one that says the same, for the reference."""
    model = hf("GPTNeoConfig", "GPTNeoForCausalLM", num_layers=2, num_heads=4, attention_types=[[["global"], 2]])("eager")
    attentions: list[Any] = [m for m in model.modules() if hasattr(m, "_attn")]
    for attention in attentions if implementation == "sdpa" else ():
        attention._attn = functools.partial(_gpt_neo_sdpa, attention)
    return model


def _gpt_neo_sdpa(self: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
    rows, columns = q.shape[2], k.shape[2]
    mask = self.bias[:, :, columns - rows : columns, :columns]
    if attention_mask is not None:
        mask = mask & (attention_mask >= 0)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0), None


DECODERS: tuple[Entry, ...] = (
    causal("Llama", "Llama", **GQA),
    causal("Mistral (no window)", "Mistral", **GQA, sliding_window=None),
    causal("Mistral (sliding)", "Mistral", sites=0, **GQA, sliding_window=12),
    causal("Qwen2", "Qwen2", **GQA),
    causal("Qwen3", "Qwen3", **GQA, head_dim=16),
    causal("Qwen3-MoE", "Qwen3Moe", **GQA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    dataclasses.replace(causal("Gemma 2", "Gemma2", sites=0, **MIXED), implementations=("eager", FLEX)),
    dataclasses.replace(causal("Gemma 2 (SDPA has no softcap)", "Gemma2", sites=1, **MIXED), implementations=("sdpa",)),
    Entry("Gemma 3", "transformers", hf("Gemma3TextConfig", "Gemma3ForCausalLM", **MIXED), 1, ids),
    causal("Phi-3", "Phi3", **GQA, sliding_window=None),
    Entry("GPT-2", "transformers", hf("GPT2Config", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, n_positions=256), 2, ids),
    Entry("GPT-Neo (masks in buffers)", "transformers", gpt_neo, 2, ids, implementations=("eager",)),
    causal("GPT-NeoX", "GPTNeoX"),
    causal("OPT", "OPT", ffn_dim=96, word_embed_proj_dim=64),
    causal("BLOOM", "Bloom", sites=0, n_head=4, n_layer=2),
    causal("MPT", "Mpt", sites=0, d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=256),
    causal("Falcon", "Falcon", new_decoder_architecture=True, num_kv_heads=2),
    causal("StarCoder2", "Starcoder2", **GQA, sliding_window=None),
    causal("DeepSeek-V2", "DeepseekV2", **MLA),
    causal("DeepSeek-V3", "DeepseekV3", **MLA, n_group=2, topk_group=1, n_shared_experts=1),
    causal("gpt-oss", "GptOss", sites=0, **MIXED, num_local_experts=4, num_experts_per_tok=2),
    causal("Cohere", "Cohere", **GQA),
    causal("OLMo 2", "Olmo2", **GQA),
)
