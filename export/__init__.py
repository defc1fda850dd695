"""Exports: artifacts that run without this project. Nothing here imports onnx, onnxruntime or TensorRT before it is used.

export.onnx(model, args, "model.onnx")                  # ONNX Runtime (CPU, CUDA), or the graph for TensorRT
export.check("model.onnx", model, other_args)           # run it and compare
export.tensorrt(model, args, "model.engine", profile=...)
export.torch_tensorrt(model, args, "model.ep")          # engines by Torch-TensorRT
export.register_torch_tensorrt()                        # then Torch-TensorRT converts the operators, however it is called
export.aoti(model, args, "model.pt2")                   # AOTInductor package
export.load_aoti("model.pt2")                           # a function
export.program(model, args)                             # what torch.export.export gives, with the policy in it

No module here is called like one of these functions: once imported, it would hide it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tsa_compile.export.common import ExportError

if TYPE_CHECKING:
    from tsa_compile.export.aoti_package import export_aoti as aoti
    from tsa_compile.export.aoti_package import load_aoti
    from tsa_compile.export.onnx_model.export_onnx import export_onnx as onnx
    from tsa_compile.export.onnx_model.run_onnx import check
    from tsa_compile.export.tensorrt_engine.engine import export_tensorrt as tensorrt
    from tsa_compile.export.torch_tensorrt_model import export_torch_tensorrt as torch_tensorrt
    from tsa_compile.export.torch_tensorrt_model import register_torch_tensorrt
    from tsa_compile.export.trace import export_program as program

__all__ = [
    "ExportError", "aoti", "check", "load_aoti", "onnx", "program", "register_torch_tensorrt", "tensorrt", "torch_tensorrt",
]  # fmt: skip
_PLACES = {  # name here -> module and name there
    "aoti": ("aoti_package", "export_aoti"),
    "check": ("onnx_model.run_onnx", "check"),
    "load_aoti": ("aoti_package", "load_aoti"),
    "onnx": ("onnx_model.export_onnx", "export_onnx"),
    "program": ("trace", "export_program"),
    "register_torch_tensorrt": ("torch_tensorrt_model", "register_torch_tensorrt"),
    "tensorrt": ("tensorrt_engine.engine", "export_tensorrt"),
    "torch_tensorrt": ("torch_tensorrt_model", "export_torch_tensorrt"),
}


def __getattr__(name: str) -> Any:
    """The public functions, each imported when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
