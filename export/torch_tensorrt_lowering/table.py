"""Which operators have a lowering: `program.run_decompositions(LOWERINGS)` leaves none of them in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from tsa_compile.export.common import ExportError
from tsa_compile.export.torch_tensorrt_lowering import attend, attend_blocks, select, select_blocks
from tsa_compile.kernels import ops  # noqa: F401  (registers the operators)

LOWERINGS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.tsa.key_view.default: select.key_view,
    torch.ops.tsa.select_tokens.default: select.select_tokens,
    torch.ops.tsa.sparse_attention.default: attend.sparse_attention,
    torch.ops.tsa.token_sparse_attention.default: attend.token_sparse_attention,
    torch.ops.tsa.select_keys.default: select.select_keys,
    torch.ops.tsa.key_attention.default: attend.key_attention,
    torch.ops.tsa.padding_range.default: select_blocks.padding_range,
    torch.ops.tsa.key_block_means.default: select_blocks.key_block_means,
    torch.ops.tsa.select_key_blocks.default: select_blocks.select_key_blocks,
    torch.ops.tsa.key_block_attention.default: attend_blocks.key_block_attention,
    torch.ops.tsa.block_sparse_attention.default: attend_blocks.block_sparse_attention,
}


def refuse_without_lowering(gm: torch.fx.GraphModule) -> None:
    """Raise an ExportError that names the first operator of ours in the graph that has no lowering."""
    for node in gm.graph.nodes:
        name = node.target.name() if isinstance(node.target, OpOverload) else ""
        if name.startswith("tsa::") and node.target not in LOWERINGS:
            taken = "BlockSparse, TokenSparse(inner=None) and ProbeSparse"
            raise ExportError(f"{node.name}: Torch-TensorRT has no form of {name}; it takes {taken}")
