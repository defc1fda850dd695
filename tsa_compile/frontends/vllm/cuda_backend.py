"""The backend on NVIDIA GPUs: FlashAttention's, with sparse rows. Imported by vLLM, by its path."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from tsa_compile.frontends.vllm.backend import Builder, Impl
from tsa_compile.kernels.common.row_blocks import KEYS


class CudaBuilder(Builder, FlashAttentionMetadataBuilder):
    # Decode is captured as the parent's. A graph of mixed batches would replay what was decided for the batch that it recorded.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH


class CudaImpl(Impl, FlashAttentionImpl):
    pass


class CudaBackend(FlashAttentionBackend):
    """What the parent supports, this does: layers and rows that are not sparse are the parent's."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up among its own names

    @classmethod
    def get_supported_kernel_block_sizes(cls, *spec: Any) -> list[Any]:
        """Pages of a multiple of 64 tokens, which the tensor memory accelerator copies as they lie; the parent's are of 16."""
        sizes = super().get_supported_kernel_block_sizes(*spec)
        return [MultipleOf(KEYS) if isinstance(size, MultipleOf) and KEYS % size.base == 0 else size for size in sizes]

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return CudaImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return CudaBuilder
