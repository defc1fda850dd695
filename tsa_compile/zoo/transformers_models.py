"""Entries from transformers."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.zoo.entries import GQA, TINY, Entry, causal, hf, ids, other, pixels

VISION: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4, num_channels=3
)
MLA: dict[str, Any] = dict(
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
    num_key_value_heads=4, first_k_dense_replace=9, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip
SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
MIXED: dict[str, Any] = dict(head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
TEXT: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)


def pair() -> dict[str, Any]:
    return {**ids(), "decoder_input_ids": ids(40)["input_ids"]}


def audio() -> dict[str, Any]:
    features = torch.randn(1, 16, 120, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": ids(40)["input_ids"]}


def image_and_text() -> dict[str, Any]:
    return {**ids(40), **pixels()}


def _llava() -> Any:
    import transformers as t

    text, vision = t.LlamaConfig(**{**TINY, **GQA}), t.CLIPVisionConfig(**VISION)
    config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95, vision_feature_layer=-1)
    torch.manual_seed(0)
    return t.LlavaForConditionalGeneration(config).eval()


def _llava_inputs() -> dict[str, Any]:
    tokens = ids(20)["input_ids"]
    return {"input_ids": torch.cat([torch.full((1, 64), 95), tokens], 1), **pixels()}


DECODERS: tuple[Entry, ...] = (
    causal("Llama", "Llama", **GQA),
    causal("Mistral (no window)", "Mistral", **GQA, sliding_window=None),
    causal("Mistral (sliding)", "Mistral", **GQA, sliding_window=16),
    causal("Qwen2", "Qwen2", **GQA),
    causal("Qwen3", "Qwen3", **GQA, head_dim=16),
    causal("Qwen3-MoE", "Qwen3Moe", **GQA, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    causal("Gemma 2", "Gemma2", **GQA, head_dim=16, sliding_window=16),
    causal("Gemma 3", "Gemma3", **GQA, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    causal("Phi-3", "Phi3", **GQA, sliding_window=None),
    Entry("GPT-2", "transformers", hf("GPT2Config", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, n_positions=256), ids),
    causal("GPT-NeoX", "GPTNeoX"),
    causal("OPT", "OPT", ffn_dim=96, word_embed_proj_dim=64),
    causal("BLOOM", "Bloom", n_head=4, n_layer=2),
    causal("MPT", "Mpt", d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=256),
    causal("Falcon", "Falcon", new_decoder_architecture=True, num_kv_heads=2),
    causal("StarCoder2", "Starcoder2", **GQA, sliding_window=None),
    causal("DeepSeek-V2", "DeepseekV2", **MLA),
    causal("DeepSeek-V3", "DeepseekV3", **MLA, n_group=2, topk_group=1, n_shared_experts=1),
    causal("gpt-oss", "GptOss", **GQA, head_dim=16, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
    causal("Cohere", "Cohere", **GQA),
    causal("OLMo 2", "Olmo2", **GQA),
    Entry("Llava (language and vision)", "transformers", _llava, _llava_inputs, "other"),
)

OTHERS: tuple[Entry, ...] = (
    other("BERT", "BertConfig", "BertModel"),
    other("RoBERTa", "RobertaConfig", "RobertaModel"),
    other("ModernBERT", "ModernBertConfig", "ModernBertModel", cls_token_id=1, sep_token_id=2),
    other("T5", "T5Config", "T5Model", pair, tiny=False, vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
    other("BART", "BartConfig", "BartModel", pair, tiny=False, **SEQ2SEQ),
    other(
        "Whisper", "WhisperConfig", "WhisperModel", audio,
        tiny=False, **SEQ2SEQ, num_mel_bins=16, max_source_positions=60, max_target_positions=64,
    ),
    other(
        "CLIP", "CLIPConfig", "CLIPModel", image_and_text,
        tiny=False, text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=32,
    ),
    other("SigLIP", "SiglipConfig", "SiglipModel", image_and_text, tiny=False, text_config=TEXT, vision_config=VISION),
    other("ViT", "ViTConfig", "ViTModel", pixels, tiny=False, **VISION),
    other("DINOv2", "Dinov2Config", "Dinov2Model", pixels, tiny=False, **VISION, mlp_ratio=2),
    other(
        "SAM (vision)", "SamVisionConfig", "SamVisionModel", pixels,
        tiny=False, **VISION, output_channels=16, window_size=4, global_attn_indexes=[1], num_pos_feats=16, mlp_dim=96,
    ),
)  # fmt: skip
__all__ = ["DECODERS", "OTHERS", "hf"]
