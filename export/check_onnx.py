"""Runs an exported ONNX file and the PyTorch model with the file's own plan, and compares."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tsa_compile.export.errors import ExportError
from tsa_compile.export.onnx_file import load_model, metadata
from tsa_compile.export.onnx_model import META
from tsa_compile.export.session import make_session
from tsa_compile.export.trace import trace
from tsa_compile.plan import Plan


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The largest absolute difference of each output, in order."""

    differences: tuple[float, ...]

    @property
    def worst(self) -> float:
        return max(self.differences, default=0.0)


def check(
    path: str | Path,
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    library: str | Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> CheckResult:
    """Compare the file at `path` with `model` under the plan that is written in the file.

    Args:
        model: the dense model that was exported.
        args, kwargs: inputs; their sizes may differ from the example inputs' where those were dynamic.
        atol: largest difference allowed, absolute.
        library, providers: as for `make_session`.

    Raises:
        ExportError: the file does not load or has no plan, or its outputs differ in number or by more than `atol`.
    """
    proto = load_model(path)
    plan = metadata(proto).get(META + "plan")
    if plan is None:
        raise ExportError(f"{path}: no plan in its metadata; not an export of tsa_compile")
    session = make_session(path, library=library, providers=providers)
    traced = trace(model, args, kwargs, policy=Plan.from_dict(json.loads(plan)), require_sites=False)
    with torch.no_grad():
        expected = _tensors(traced.program.module()(*args, **dict(kwargs or {})))
    feed = dict(zip((i.name for i in session.get_inputs()), _tensors((args, dict(kwargs or {}))), strict=True))
    actual = session.run(None, {name: value.cpu().numpy() for name, value in feed.items()})
    if len(actual) != len(expected):
        raise ExportError(f"{path}: {len(actual)} outputs, the model has {len(expected)}")
    result = CheckResult(tuple(_difference(torch.from_numpy(a), e) for a, e in zip(actual, expected, strict=True)))
    if not result.worst <= atol:
        raise ExportError(f"{path}: outputs differ by up to {result.worst:.3g}, more than {atol:.3g}")
    return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; infinite if the shapes differ, NaN if either holds NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    return (actual.double() - expected.cpu().double()).abs().max().item() if actual.numel() else 0.0
