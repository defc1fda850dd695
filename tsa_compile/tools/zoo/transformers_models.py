"""Entries from transformers that are not decoders alone: encoders, encoder-decoders, vision, both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tsa_compile.tools.zoo.entries import GQA, TINY, Entry, from_config, ids, other, pixels

VISION: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4, num_channels=3
)
SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=96, decoder_ffn_dim=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
TEXT: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
IMAGE_TOKEN = 95


def pair() -> dict[str, Any]:
    return {**ids(), "decoder_input_ids": ids(40)["input_ids"]}


def audio() -> dict[str, Any]:
    features = torch.randn(1, 16, 120, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": ids(40)["input_ids"]}


def image_and_text() -> dict[str, Any]:
    return {**ids(40), **pixels()}


def _llava(implementation: str) -> nn.Module:
    import transformers as t

    text, vision = t.LlamaConfig(**{**TINY, **GQA}), t.CLIPVisionConfig(**VISION)
    config = t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    return from_config(t.LlavaForConditionalGeneration, config, implementation)


def _qwen2_vl(implementation: str) -> nn.Module:
    import transformers as t

    text = {**TINY, **GQA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    vision = dict(depth=2, embed_dim=64, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=4, spatial_merge_size=2)
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    return from_config(t.Qwen2VLForConditionalGeneration, config, implementation)


def _with_image_tokens(n: int) -> torch.Tensor:
    return torch.cat([torch.full((1, n), IMAGE_TOKEN), ids(20)["input_ids"]], 1)


def _llava_inputs() -> dict[str, Any]:
    return {"input_ids": _with_image_tokens(64), **pixels()}


def _qwen2_vl_inputs() -> dict[str, Any]:
    patches = torch.randn(64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    tokens = _with_image_tokens(16)
    kinds = (tokens == IMAGE_TOKEN).int()
    return {"input_ids": tokens, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 8, 8]]), "mm_token_type_ids": kinds}


OTHERS: tuple[Entry, ...] = (
    other("BERT", "BertConfig", "BertModel", kind="encoder", tiny=True),
    other("RoBERTa", "RobertaConfig", "RobertaModel", kind="encoder", tiny=True),
    other("ModernBERT", "ModernBertConfig", "ModernBertModel", kind="encoder", tiny=True, cls_token_id=1, sep_token_id=2),
    other(
        "T5", "T5Config", "T5ForConditionalGeneration", pair, kind="seq2seq",
        vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0,
    ),
    other("BART", "BartConfig", "BartForConditionalGeneration", pair, kind="seq2seq", sites=2, **SEQ2SEQ),
    other(
        "Whisper", "WhisperConfig", "WhisperModel", audio, sites=2,
        **SEQ2SEQ, num_mel_bins=16, max_source_positions=60, max_target_positions=64,
    ),
    other(
        "CLIP", "CLIPConfig", "CLIPModel", image_and_text, sites=2,
        text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=32,
    ),
    other("SigLIP", "SiglipConfig", "SiglipModel", image_and_text, text_config=TEXT, vision_config=VISION),
    other("ViT", "ViTConfig", "ViTModel", pixels, **VISION),
    other("DINOv2", "Dinov2Config", "Dinov2Model", pixels, **VISION, mlp_ratio=2),
    other(
        "SAM (vision)", "SamVisionConfig", "SamVisionModel", pixels,
        **VISION, output_channels=16, window_size=4, global_attn_indexes=[1], num_pos_feats=16, mlp_dim=96,
    ),
    Entry("Llava", "transformers", _llava, 2, _llava_inputs, "call"),
    Entry("Qwen2-VL", "transformers", _qwen2_vl, 2, _qwen2_vl_inputs, "call"),
)  # fmt: skip
