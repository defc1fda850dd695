"""Export to ONNX: one `ai.tsa::TokenSparseAttention` node for each attention site, with or without a portable body."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.common import ExportError, require
from tsa_compile.export.onnx_model import node as site_node
from tsa_compile.export.onnx_model.node import DOMAIN, DOMAIN_VERSION, META, TARGETS, function
from tsa_compile.export.trace import Traced, trace
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy

if TYPE_CHECKING:
    import onnx_ir as ir

FORMS = ("portable", "custom")
_SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class OnnxExport:
    """What was written: the file, the attention nodes in it, and the plan."""

    path: Path
    nodes: tuple[str, ...]
    plan: Plan


def export_onnx(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    form: str = "portable",
    target: str = "onnxruntime",
    dynamic_shapes: Any = None,
    opset: int = 21,
    require_sites: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> OnnxExport:
    """Write `model` with token-sparse attention as an ONNX file that runs without this project.

    Args:
        model: a module, or an ExportedProgram (it stays as it is).
        args, kwargs: example inputs.
        path: the file; weights above 2 GB go beside it, as ONNX external data.
        policy: a policy, a plan, either as a dict, or None for `TokenSparse()`.
        form: "portable": each node carries a body of standard operators, so any runtime executes it. "custom": no
            body; the session must register the native library (`tsa_compile.export.native`).
        target: whose limits the portable body respects, "onnxruntime" or "tensorrt"; or "tensorrt_plugin", whose attention
            is plugins of full TensorRT (`tensorrt_plugin`) between standard operators.
        dynamic_shapes: as for `torch.export.export`; without it every size is fixed.
        opset: 21 to 24. From 23 on the exporter's optimiser is off: it fuses RoPE in a way that fails for batch > 1.
        require_sites: raise if no attention site takes the policy, as in a decode graph, which stays dense.
        input_names, output_names: names of the file's inputs and outputs, in order; None: those of torch.export.

    Raises:
        ExportError: no site was replaced, or a site cannot be one node; the message names it.
        ValueError: unknown form, target or opset.
        ImportError: onnx or onnxscript is missing.
    """
    _check_options(form, target, opset)
    onnx = require("onnx", "onnx")
    table = site_node.translation()
    traced = trace(model, args, kwargs, policy=policy, dynamic_shapes=dynamic_shapes, require_sites=require_sites)
    _check_sites(traced)
    program = torch.onnx.export(
        traced.program,
        dynamo=True,
        custom_translation_table=table,
        opset_version=opset,
        optimize=opset < 23,
        verbose=False,
        input_names=input_names,
        output_names=output_names,
    )
    assert program is not None
    nodes = _finish(program.model, form, target, opset)
    _name_by_module(nodes, traced)
    _describe(program.model, traced, form, target)
    if target == "tensorrt_plugin":
        _inline(program.model)
    program.save(str(path))
    onnx.checker.check_model(str(path), full_check=True)
    return OnnxExport(Path(path), tuple(node.name or "" for node in nodes), traced.plan)


def _check_options(form: str, target: str, opset: int) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}, got {target!r}")
    if form == "custom" and target != "onnxruntime":
        raise ValueError("form='custom' is for ONNX Runtime; TensorRT takes the portable form")
    if not 21 <= opset <= 24:
        raise ValueError(f"opset must be in 21..24, got {opset}")


def _check_sites(traced: Traced) -> None:
    for site in traced.sites:
        dtype = site.all_input_nodes[0].meta["val"].dtype
        if dtype not in _SUPPORTED:
            raise ExportError(f"{site.name}: q is {dtype}; ONNX exports take float32, float16 and bfloat16")


def _finish(model: ir.Model, form: str, target: str, opset: int) -> list[ir.Node]:
    """Attach a body for each variant that occurs; returns the sites' nodes in graph order."""
    nodes = site_node.sites(model)
    for node in nodes:
        if form == "portable":
            variant = site_node.variant_of(node, target)
            site_node.bind(node, variant)
            if variant.identifier not in model.functions:
                model.functions[variant.identifier] = function(variant, opset)
    model.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
    if target == "tensorrt_plugin":
        model.opset_imports.setdefault("tsa", 1)
    return nodes


def _inline(model: ir.Model) -> None:
    """Bodies into the graph: TensorRT reads a plugin's attributes from its node, where they must be literal."""
    require("onnx_ir.passes.common", "onnx").InlinePass()(model)


def _name_by_module(nodes: list[ir.Node], traced: Traced) -> None:
    """Nodes get the path of the module that attends, so that a runtime's messages say where they are."""
    modules = [d.site.module for d in traced.decisions if d.reason is None]
    if len(modules) == len(nodes) == len(set(modules)) and all(modules):
        for node, module in zip(nodes, modules, strict=True):
            node.name = f"{module}.token_sparse_attention"


def _describe(model: ir.Model, traced: Traced, form: str, target: str) -> None:
    """Metadata: which release wrote the file, with which plan, and what became of each site."""
    from tsa_compile import __version__

    sites = [
        {"layer": d.site.layer, "module": d.site.module, "policy": d.policy.name, "kept dense because": d.reason}
        for d in traced.decisions
    ]
    model.metadata_props.update(
        {
            META + "version": __version__,
            META + "plan": json.dumps(traced.plan.to_dict()),
            META + "form": form,
            META + "target": target,
            META + "sites": json.dumps(sites),
        }
    )
