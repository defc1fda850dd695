"""Reading ONNX files, with errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tsa_compile.export.errors import ExportError
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
