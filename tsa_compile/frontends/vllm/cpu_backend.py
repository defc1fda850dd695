"""The backend on CPU: for tests, and as what the one on GPUs must compute. Imported by vLLM, by its path.

vLLM's CPU kernels pack keys as their instructions want them, so a sparse layer writes plain pages of its own, and reads them in
plain PyTorch; a dense layer is the parent's in all. So is every layer without `--attention-backend CUSTOM`: vLLM takes this class
on CPU whatever was asked.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from tsa_compile.frontends.vllm.backend import Builder, Impl
from tsa_compile.frontends.vllm.prefill import pages
from tsa_compile.kernels.common.view import rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


class CpuBuilder(Builder, CPUAttentionMetadataBuilder):
    pass


class CpuImpl(Impl, CPUAttentionBackendImpl):
    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Plain pages `[blocks, Hk, block, 2 D]` for a sparse layer."""
        if self.tsa is None or self.tsa.dense:
            return super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        size, slots = kv_cache.shape[2], slot_mapping[: key.shape[0]]
        real = slots >= 0
        slots = slots[real]
        kv_cache[slots // size, :, slots % size] = torch.cat((key[: len(real)][real], value[: len(real)][real]), -1)
        return None

    def dense(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, metadata: Any, output: Tensor,
              *scales: Any) -> Tensor:  # fmt: skip
        if metadata is None or self.tsa is None or self.tsa.dense:
            return super().dense(layer, query, key, value, kv_cache, metadata, output, *scales)
        result = output.view(query.shape[0], -1, self.head_size)
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        for i, length in enumerate(lengths):
            begin, end = starts[i], starts[i + 1]
            if begin < end:
                result[begin:end] = self._row(query[begin:end], kv_cache, metadata.block_table[i], length)
        return output

    def _row(self, query: Tensor, kv_cache: Tensor, blocks: Tensor, length: int) -> Tensor:
        """Dense causal attention of one request's new tokens `[rows, H, D]`, the last of `length`, to its pages."""
        view = KvView(blocks[None, : -(-length // kv_cache.shape[2])], kv_cache.shape[2], None, None)
        k, v = (rows_in_order(x, view)[:, :, :length] for x in pages(kv_cache, self.head_size))
        causal = torch.ones(query.shape[0], length, dtype=torch.bool).tril(length - query.shape[0])
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(query.transpose(0, 1)[None], k, v, causal, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1)


class CpuBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[Any]:
        return CpuImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return CpuBuilder
