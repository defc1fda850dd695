"""Entries from timm, torchvision and diffusers: bidirectional attention, which must stay as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tsa_compile.tools.zoo.entries import NO_FAST_PATH, Entry, pixels, sharpen


def _images() -> dict[str, Any]:
    return {"x": pixels()["pixel_values"]}


def _timm(name: str) -> Callable[[str], nn.Module]:
    def build(implementation: str) -> nn.Module:
        import timm

        timm.layers.set_fused_attn(implementation == "sdpa")
        return sharpen(timm.create_model(name, img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_classes=8))

    return build


def _torchvision_vit(implementation: str) -> nn.Module:
    from torchvision.models import VisionTransformer

    return sharpen(VisionTransformer(32, patch_size=4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=96, num_classes=8))


def _diffusers(build: Callable[[Any], nn.Module]) -> Callable[[str], nn.Module]:
    """diffusers has a processor for each implementation; SDPA is its default."""

    def chosen(implementation: str) -> nn.Module:
        import diffusers
        from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

        model = build(diffusers)
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor2_0() if implementation == "sdpa" else AttnProcessor())
        return sharpen(model)

    return chosen


def _dit(diffusers: Any) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=16, patch_size=2,
        norm_num_groups=4,
    )  # fmt: skip


def _unet(diffusers: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _latents() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def _dit_inputs() -> dict[str, Any]:
    return {"hidden_states": _latents(), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}


def _unet_inputs() -> dict[str, Any]:
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    return {"sample": _latents(), "timestep": torch.tensor(3), "encoder_hidden_states": text}


_TWO = ("sdpa", "eager")
VISION: tuple[Entry, ...] = (
    Entry("ViT", "timm", _timm("vit_tiny_patch16_224"), 0, _images, "call", _TWO),
    Entry("DINOv2", "timm", _timm("vit_small_patch14_dinov2"), 0, _images, "call", _TWO),
    Entry("ViT", "torchvision", _torchvision_vit, 0, _images, "call", (NO_FAST_PATH,)),
    Entry("DiT", "diffusers", _diffusers(_dit), 0, _dit_inputs, "call", _TWO),
    Entry("UNet (cross attention)", "diffusers", _diffusers(_unet), 0, _unet_inputs, "call", _TWO),
)
