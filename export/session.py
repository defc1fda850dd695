"""ONNX Runtime sessions for exported files, with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsa_compile.export.body import DOMAIN
from tsa_compile.export.errors import ExportError
from tsa_compile.export.native import check_library
from tsa_compile.export.onnx_file import load_model
from tsa_compile.export.require import require


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
