"""What all exports share: their error, and imports of optional packages that say what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

_INSTALL = {
    "hf": "pip install 'tsa-compile[hf]'",
    "onnx": "pip install 'tsa-compile[onnx]'",
    "tensorrt": "pip install 'tsa-compile[tensorrt]'",
    "torch-tensorrt": "pip install torch==2.14.1 torch-tensorrt-rtx==2.14.0",
    "triton": "pip install 'tsa-compile[triton]'",
}


class ExportError(RuntimeError):
    """A model, site or file cannot be exported or loaded as asked; the message names it."""


def require(module: str, extra: str) -> ModuleType:
    """The module, or an ImportError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this export needs the module {module!r} ({error}): {_INSTALL[extra]}") from error
