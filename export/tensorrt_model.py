"""TensorRT from a model in one call: portable graph, then engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.tensorrt_engine import Profile, build_engine, load_runtime


def export_tensorrt(
    model_or_onnx: nn.Module | ExportedProgram | str | Path,
    args: tuple[Any, ...] | None,
    path: str | Path,
    *,
    profile: Profile,
    runtime: str = "tensorrt_rtx",
    compute_capabilities: Sequence[str] = (),
    plugins: bool = False,
    **onnx_options: Any,
) -> Path:
    """Build a TensorRT engine of `model_or_onnx` with token-sparse attention; it runs without this project.

    Args:
        model_or_onnx: a module or ExportedProgram; or the path of a graph exported with `target="tensorrt"`.
        args: example inputs; None for a path.
        path: the engine file to write.
        profile, runtime, compute_capabilities: see `build_engine`.
        plugins: attention by this project's kernels, compiled into the engine (runtime "tensorrt"); else standard operators.
        onnx_options: `policy`, `dynamic_shapes`, `kwargs`, `opset` of `export_onnx`.

    Raises:
        ExportError, ValueError, ImportError: as `export_onnx` and `build_engine`.
    """
    if plugins and runtime != "tensorrt":
        raise ValueError(f"plugins=True is for runtime 'tensorrt'; {runtime} has none")
    load_runtime(runtime)  # before the model is traced
    settings: dict[str, Any] = {
        "profile": profile,
        "runtime": runtime,
        "compute_capabilities": compute_capabilities,
    }
    if isinstance(model_or_onnx, (str, Path)):
        if onnx_options:
            raise ValueError(f"{sorted(onnx_options)} belong to the export of a model; this is a file already")
        return build_engine(model_or_onnx, path, **settings)
    from tsa_compile.export.onnx_model import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        export_onnx(model_or_onnx, args or (), graph, target="tensorrt_plugin" if plugins else "tensorrt", **onnx_options)
        return build_engine(graph, path, **settings)
