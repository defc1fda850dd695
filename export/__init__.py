"""Exports: artifacts that run without this project. Nothing here imports onnx, onnxruntime or TensorRT before a call.

export.onnx(model, args, "model.onnx")                  # ONNX Runtime (CPU, CUDA), or the graph for TensorRT
export.check("model.onnx", model, other_args)           # run it and compare
export.tensorrt(model, args, "model.engine", profile=...)
export.torch_tensorrt(model, args, "model.ep")          # engines by Torch-TensorRT
export.aoti(model, args, "model.pt2")                   # AOTInductor package
"""

from __future__ import annotations

from typing import Any

from tsa_compile.export.errors import ExportError

__all__ = ["ExportError", "aoti", "check", "load_aoti", "onnx", "tensorrt", "torch_tensorrt"]


def onnx(*args: Any, **kwargs: Any) -> Any:
    """Write an ONNX file; see `tsa_compile.export.onnx_model.export_onnx`."""
    from tsa_compile.export.onnx_model import export_onnx

    return export_onnx(*args, **kwargs)


def check(*args: Any, **kwargs: Any) -> Any:
    """Run an ONNX file and compare it with the model; see `tsa_compile.export.check_onnx.check`."""
    from tsa_compile.export.check_onnx import check as run_check

    return run_check(*args, **kwargs)


def tensorrt(*args: Any, **kwargs: Any) -> Any:
    """Build a TensorRT or TensorRT-RTX engine; see `tsa_compile.export.tensorrt_model.export_tensorrt`."""
    from tsa_compile.export.tensorrt_model import export_tensorrt

    return export_tensorrt(*args, **kwargs)


def torch_tensorrt(*args: Any, **kwargs: Any) -> Any:
    """Compile with Torch-TensorRT; see `tsa_compile.export.torch_tensorrt_model.export_torch_tensorrt`."""
    from tsa_compile.export.torch_tensorrt_model import export_torch_tensorrt

    return export_torch_tensorrt(*args, **kwargs)


def aoti(*args: Any, **kwargs: Any) -> Any:
    """Compile an AOTInductor package; see `tsa_compile.export.aoti_package.export_aoti`."""
    from tsa_compile.export.aoti_package import export_aoti

    return export_aoti(*args, **kwargs)


def load_aoti(*args: Any, **kwargs: Any) -> Any:
    """Load an AOTInductor package; see `tsa_compile.export.aoti_package.load_aoti`."""
    from tsa_compile.export.aoti_package import load_aoti as load

    return load(*args, **kwargs)
