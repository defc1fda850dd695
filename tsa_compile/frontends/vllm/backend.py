"""What our backend adds to one of vLLM's, on CPU and on CUDA alike: mixins that stand before the parent's classes.

The builder tells the sparse rows of a batch from the others; the layers do the sparse rows, the parent the rest. Metadata is the
parent's own, with a `Split` beside it, so whatever else in vLLM reads it finds what it knows; a batch without sparse rows, decode
above all, is the parent's from end to end, CUDA graphs included.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tsa_compile.frontends.vllm import counts
from tsa_compile.frontends.vllm.decode import append, new_index, sparse_decode
from tsa_compile.frontends.vllm.layers import Layer, decide, tell
from tsa_compile.frontends.vllm.options import Options, read
from tsa_compile.frontends.vllm.parents import ParentBuilder, ParentImpl
from tsa_compile.frontends.vllm.prefill import pages, reserve, sparse_prefill
from tsa_compile.frontends.vllm.rows import Split, Wants, split

Tensor = torch.Tensor


class Builder(ParentBuilder):
    """Mixin of a metadata builder."""

    supports_update_block_table = False  # a split holds the table of blocks

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.tsa_options = read(vllm_config.additional_config)
        self.tsa_layers = bind(vllm_config, layer_names, self.tsa_options, device) if asked(vllm_config) else {}

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The parent's metadata, with `tsa_split`: the batch's `Split`, or None, for each kind of layer."""
        parent = super().build
        metadata = parent(common_prefix_len, common_attn_metadata, fast_build)
        metadata.tsa_split = {}  # by what a layer wants
        for wants, attentions in self.tsa_layers.items():
            # A run's is built fast: buffers that the parent keeps are those of the whole batch.
            metadata.tsa_split[wants] = split(common_attn_metadata, wants, lambda run: parent(0, run, True))
            for attention in attentions if wants.decode else ():
                attention.impl.make_index(attention.kv_cache)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Of a batch made up for a recording: each row is a decode step, whatever it is said to be."""
        return super().build_for_cudagraph_capture(dataclasses.replace(common_attn_metadata, is_prefilling=None))


class Impl(ParentImpl):
    """Mixin of an attention's implementation. `tsa` says what was decided, once the cache is there; None before."""

    supports_dcp = False
    supports_pcp = False
    tsa: Layer | None = None
    tsa_wants: Wants | None = None
    tsa_index: dict[str, Tensor] | None = None  # sums of the cache's pages and their counts, by physical block

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config()
        self.tsa_options = read(config.additional_config)  # a wrong option stops the engine here, before weights are loaded
        self.tsa_max_tokens = config.model_config.max_model_len

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As the parent's, with sparse rows by the layer's policy."""
        if attn_metadata is None:  # vLLM measures how much memory a step takes
            reserve(self.tsa_options.prefill, query, self.num_kv_heads, self.tsa_max_tokens)
        found: Split | None = None if attn_metadata is None else attn_metadata.tsa_split.get(self.tsa_wants)
        if self.tsa_index is not None and attn_metadata is not None:
            append(self.tsa_index, pages(kv_cache, self.head_size)[0], attn_metadata)
        if found is None or self.tsa is None:
            return self.dense(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tsa_compile: the result of sparse rows cannot be quantized as it is written")
        for run in found.dense:
            part = slice(run.begin, run.end)
            self.dense(layer, query[part], key[part], value[part], kv_cache, run.metadata, output[part], None, None)
        result = output.view(query.shape[0], -1, self.head_size)
        operands = (self.tsa.path, self.scale, query, *pages(kv_cache, self.head_size), result, found)
        if self.tsa.policy is not None:
            sparse_prefill(self.tsa.policy, *operands)
        if self.tsa.decode is not None:
            sparse_decode(self.tsa.decode, *operands, self.tsa_index)
        counts.add(self.tsa.path, found)
        return output

    def make_index(self, kv_cache: Any) -> None:
        """Room for the sums of the cache's pages, once the cache is there, and before any graph is recorded."""
        cache = kv_cache[0] if isinstance(kv_cache, (list, tuple)) else kv_cache
        if self.tsa_index is None and cache.numel() > 0:
            self.tsa_index = new_index(pages(cache, self.head_size)[0])

    def dense(self, *args: Any) -> Tensor:
        """The parent's attention."""
        out: Tensor = super().forward(*args)
        return out


def asked(config: Any) -> bool:
    """Whether the user chose our backend: vLLM on CPU takes it whatever was chosen."""
    chosen = config.attention_config
    named = [chosen.backend, *(getattr(chosen, "backend_per_kind", None) or {}).values()]
    return any(getattr(backend, "name", backend) == "CUSTOM" for backend in named)


def bind(config: Any, names: list[str], options: Options, device: torch.device) -> dict[Wants, list[Any]]:
    """Decide for the layers of a cache's group, and tell it once an engine. The layers that are not dense, by what they want."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    attentions = get_layers_from_vllm_config(config, Attention)
    decided = decide(attentions, options, config, device)
    if all(getattr(layer.impl, "tsa", None) is None for layer in attentions.values()):
        tell(decided, options)
    kinds: dict[Wants, list[Any]] = {}
    for name in (name for name in names if name in decided and hasattr(attentions[name].impl, "tsa")):
        layer, attention = decided[name], attentions[name]
        attention.impl.tsa = layer
        if not layer.dense:
            least = None if layer.policy is None else layer.policy.min_queries
            attention.impl.tsa_wants = Wants(least, options.min_context, layer.decode is not None)
            kinds.setdefault(attention.impl.tsa_wants, []).append(attention)
    return kinds
