"""Exported ONNX files: reading them, running them on ONNX Runtime, and comparing with PyTorch; errors say what is wrong."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tsa_compile.export.common import ExportError, require
from tsa_compile.export.onnx_model.node import DOMAIN, META
from tsa_compile.export.trace import trace
from tsa_compile.plan import Plan

if TYPE_CHECKING:
    import onnx


def load_model(path: str | Path) -> onnx.ModelProto:
    """The file's graph, without its external weights.

    Raises:
        ExportError: no such file, or not an ONNX model.
    """
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such file") from error
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise ExportError(f"{path}: not an ONNX model, or damaged ({error})") from error
    if not model.graph.node:
        raise ExportError(f"{path}: not an ONNX model, or damaged (it has no nodes)")
    return model


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The file's metadata."""
    return {p.key: p.value for p in model.metadata_props}


def check_library(path: str | Path) -> None:
    """Raise an ExportError unless `path` is a whole shared library: the loader dies on a truncated one."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ExportError(f"{path}: cannot read the operator library ({error.strerror})") from error
    if len(data) < 64 or data[:4] != b"\x7fELF":
        raise ExportError(f"{path}: not a shared library, or damaged")
    sections, (size, count) = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<HH", data, 58)
    if sections + size * count > len(data):  # the section table is the last thing in the file
        raise ExportError(f"{path}: the library is damaged: {len(data)} bytes, at least {sections + size * count} expected")


def make_session(
    path: str | Path,
    *,
    library: str | Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    options: Any = None,
) -> Any:
    """An `onnxruntime.InferenceSession` for a file of either form.

    Args:
        library: `libtsa_ort.so`; the custom form needs it, the portable form is faster with it.
        providers: execution providers, first choice first.
        options: an `onnxruntime.SessionOptions`, or None.

    Raises:
        ExportError: the file is missing or damaged; it is of the custom form and `library` is None; the library does
            not load; or ONNX Runtime refuses the model. The message names the nodes or holds ONNX Runtime's words.
    """
    ort = require("onnxruntime", "onnx")
    model = load_model(path)
    sites = [n.name for n in model.graph.node if n.domain == DOMAIN]
    if sites and not model.functions and library is None:
        raise ExportError(
            f"{path}: nodes {', '.join(sites)} ({DOMAIN}) have no portable body; "
            "pass library=tsa_compile.export.native.build_library()"
        )
    missing = [p for p in providers if p not in ort.get_available_providers()]
    if missing:
        raise ExportError(f"this ONNX Runtime has no {missing[0]}; it has {', '.join(ort.get_available_providers())}")
    options = options or ort.SessionOptions()
    if library is not None:
        check_library(library)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors share no base class but Exception
        raise ExportError(f"{path}: {error}") from error


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
