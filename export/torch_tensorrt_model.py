"""Torch-TensorRT: this project's operators become operators that it converts, or a plugin that calls our kernels.

`register_torch_tensorrt` teaches the process the first, for every way into Torch-TensorRT: a rewritten model is one engine.
Full TensorRT has plugins: there `export_torch_tensorrt` makes one of each site without a key mask.
`torch_tensorrt.dynamo.conversion.plugins.custom_op` makes plugin and converter from an operator's schema and fake, but takes no
`Tensor?`; so the operator it is given has no key mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.common import require
from tsa_compile.export.fuse import fuse_selection
from tsa_compile.export.torch_tensorrt_lowering.converters import register_converters
from tsa_compile.export.torch_tensorrt_lowering.table import LOWERINGS, refuse_without_lowering
from tsa_compile.export.trace import trace
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy

OPERATOR = "tsa::unmasked_token_sparse_attention"
OLDEST = (2, 14)  # of torch_tensorrt: the oldest that was tried
_NUMBERS = "float scale, float coverage, int window, int pool, int min_tokens, int strip_window, int strip_sinks, int heavy"
_LOWERED, _PLUGIN = "_tsa_lowered", "_tsa_registered"  # each is registered once in a process
_LIBRARY = torch.library.Library("tsa", "FRAGMENT")


def register_torch_tensorrt() -> ModuleType:
    """Teach Torch-TensorRT, in this process, `BlockSparse`, `TokenSparse` and `ProbeSparse`; returns `torch_tensorrt`.

    They become core operators with dynamic shapes (`LOWERINGS`) wherever Torch-TensorRT decomposes a graph: `dynamo.compile`,
    `dynamo.convert_exported_program_to_serialized_trt_engine`, `torch.compile(backend="torch_tensorrt")`. The number of kept
    tokens is a size that depends on data, which Dynamo takes only with `torch._dynamo.config.capture_scalar_outputs`: it is set.

    Raises:
        ImportError: torch_tensorrt is missing, is older than 2.14, or finds no GPU, which it asks for when it is imported.
    """
    torch_tensorrt = _package()
    if not getattr(torch_tensorrt, _LOWERED, False):
        lowering = require("torch_tensorrt.dynamo.lowering", "torch-tensorrt")
        lowering.TORCH_TRT_DECOMPOSITIONS.update(LOWERINGS)
        register_converters()
        setattr(torch_tensorrt, _LOWERED, True)
    torch._dynamo.config.capture_scalar_outputs = True
    return torch_tensorrt


def _package() -> ModuleType:
    try:
        torch_tensorrt = require("torch_tensorrt", "torch-tensorrt")
    except RuntimeError as error:
        raise ImportError(f"torch_tensorrt does not import without a GPU: {error}") from error
    found = torch_tensorrt.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ImportError(f"torch_tensorrt {found} is too old: pip install torch==2.14.1 torch-tensorrt-rtx==2.14.0")
    return torch_tensorrt


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
    """Compile `model` with Torch-TensorRT and save it; a process that loads it imports torch_tensorrt.

    On TensorRT-RTX the attention is part of the engine; `BlockSparse`, `TokenSparse` with any option but `inner`, and
    `ProbeSparse` are taken. On full TensorRT sites of `TokenSparse` without a key mask are a plugin that calls our kernels: a
    process that loads the file imports tsa_compile too.

    Args:
        model, args, kwargs, policy, dynamic_shapes: as for `export_onnx`.
        path: the `.ep` file.
        options: of `torch_tensorrt.dynamo.compile`; `arg_inputs` gives the ranges of dynamic sizes, as `torch_tensorrt.Input`s.

    Raises:
        ExportError: no attention site was replaced; or an operator has no form for Torch-TensorRT, which the message names.
        ImportError: as `register_torch_tensorrt`.
    """
    torch_tensorrt = register_torch_tensorrt()
    plugins = torch_tensorrt.ENABLED_FEATURES.qdp_plugin
    traced = trace(model, args, kwargs, policy=policy, dynamic_shapes=dynamic_shapes, one_node=False)
    gm = traced.program.graph_module
    if plugins:
        fuse_selection(gm)
    refuse_without_lowering(gm)
    if plugins and use_unmasked_operator(gm) and not getattr(torch_tensorrt, _PLUGIN, False):
        require("torch_tensorrt.dynamo.conversion.plugins", "torch-tensorrt").custom_op(OPERATOR, supports_dynamic_shapes=True)
        setattr(torch_tensorrt, _PLUGIN, True)
    inputs = {"arg_inputs": args, "kwarg_inputs": dict(kwargs or {}), **options}
    compiled = torch_tensorrt.dynamo.compile(traced.program, **inputs)
    example = {"arg_inputs": list(args), "kwarg_inputs": dict(kwargs or {})}
    torch_tensorrt.save(compiled, str(path), **example, dynamic_shapes=dynamic_shapes)  # without, one length alone is saved
    return Path(path)
