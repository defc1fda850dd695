"""What our mixins take for granted of vLLM's classes, said for type checkers: where the code runs, both are `object`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:

    class ParentBuilder:
        """vLLM's `AttentionMetadataBuilder`."""

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None: ...

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any: ...

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any: ...

    class ParentImpl:
        """vLLM's `AttentionImpl`."""

        num_kv_heads: int
        head_size: int
        scale: float

        def forward(self, *args: Any) -> Any: ...
else:
    ParentBuilder = ParentImpl = object
