"""Torch-TensorRT: engines for the dense parts of a rewritten model, and a plugin that calls this project's operator.

`torch_tensorrt.dynamo.conversion.plugins.custom_op` makes plugin and converter from an operator's schema and fake, but takes no
`Tensor?`; so the operator it is given has no key mask. A site with one stays a PyTorch operator between engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.common import require
from tsa_compile.export.trace import trace
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy

OPERATOR = "tsa::unmasked_token_sparse_attention"
_NUMBERS = "float scale, float coverage, int window, int pool, int min_tokens, int strip_window, int strip_sinks, int heavy"
_DONE = "_tsa_registered"  # the plugins are registered once in a process
_LIBRARY = torch.library.Library("tsa", "FRAGMENT")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.ops.tsa.token_sparse_attention(q, k, v, None, *rest).contiguous()


def define_operator() -> None:
    """`OPERATOR`: `tsa::token_sparse_attention` without a key mask, with a contiguous result, as a plugin's outputs are."""
    if hasattr(torch.ops.tsa, OPERATOR.partition("::")[2]):
        return
    _LIBRARY.define(f"{OPERATOR.partition('::')[2]}(Tensor q, Tensor k, Tensor v, {_NUMBERS}, str engine) -> Tensor")
    _LIBRARY.impl(OPERATOR.partition("::")[2], _attend, "CompositeExplicitAutograd")
    torch.library.register_fake(OPERATOR, lambda q, k, v, *_: q.new_empty(*q.shape[:3], v.shape[3]), lib=_LIBRARY)


def use_unmasked_operator(gm: fx.GraphModule) -> int:
    """Sites without a key mask call `OPERATOR`, in place; returns how many."""
    define_operator()
    target = torch.ops.tsa.unmasked_token_sparse_attention.default
    changed = 0
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tsa.token_sparse_attention.default):
        q, k, v, key_mask, *rest = node.args
        if key_mask is None:
            node.target, node.args = target, (q, k, v, *rest)
            changed += 1
    gm.recompile()
    return changed


def export_torch_tensorrt(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Path:
    """Compile `model` with Torch-TensorRT and save it; a process that loads it imports torch_tensorrt and tsa_compile.

    Args:
        model, args, kwargs, policy, dynamic_shapes: as for `export_onnx`.
        path: the `.ep` file.
        options: of `torch_tensorrt.dynamo.compile`.

    Raises:
        ExportError: no attention site was replaced.
        ImportError: torch_tensorrt is missing.
    """
    torch_tensorrt = require("torch_tensorrt", "torch-tensorrt")
    plugins = require("torch_tensorrt.dynamo.conversion.plugins", "torch-tensorrt")
    traced = trace(model, args, kwargs, policy=policy, dynamic_shapes=dynamic_shapes)
    if use_unmasked_operator(traced.program.graph_module) and not getattr(torch_tensorrt, _DONE, False):
        plugins.custom_op(OPERATOR, supports_dynamic_shapes=True)
        setattr(torch_tensorrt, _DONE, True)
    compiled = torch_tensorrt.dynamo.compile(traced.program, arg_inputs=args, kwarg_inputs=dict(kwargs or {}), **options)
    torch_tensorrt.save(compiled, str(path), arg_inputs=list(args), kwarg_inputs=dict(kwargs or {}))
    return Path(path)
