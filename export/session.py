"""ONNX Runtime sessions for exported files, with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsa_compile.export.body import DOMAIN
from tsa_compile.export.errors import ExportError
from tsa_compile.export.native import check_library
from tsa_compile.export.require import require

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
