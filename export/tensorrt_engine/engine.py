"""TensorRT engines of a model, or of an ONNX file exported for TensorRT, through TensorRT's ONNX parser.

One code for two products with one Python interface: TensorRT, which builds for the GPU at hand, and TensorRT-RTX, which
builds ahead of time on any machine, for the compute capabilities named (8.0, 8.6, 8.9, 12.0; it has no data-centre
Hopper or Blackwell).
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.common import ExportError
from tsa_compile.export.onnx_model.export_onnx import export_onnx
from tsa_compile.export.onnx_model.run_onnx import load_model, metadata
from tsa_compile.export.tensorrt_engine.plugin import register_plugins

RUNTIMES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {"tensorrt": "pip install tensorrt", "tensorrt_rtx": "pip install 'tsa-compile[tensorrt]'"}
Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


def load_runtime(runtime: str) -> ModuleType:
    """The Python module of `runtime`, a key of RUNTIMES.

    Raises:
        ValueError: no such runtime.
        ImportError: it is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {sorted(RUNTIMES)}, got {runtime!r}")
    for name in RUNTIMES[runtime]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError(f"{runtime} is not installed: {_INSTALL[runtime]}")


class Parsed:
    """A parsed ONNX file. `network` is TensorRT's INetworkDefinition; `messages` collects warnings and errors."""

    def __init__(self, path: str | Path, trt: ModuleType, plugins: bool = False) -> None:
        self.messages: list[str] = []
        self.trt = trt
        self._logger = _logger(trt, self.messages)
        self.builder = trt.Builder(self._logger)
        flag = trt.NetworkDefinitionCreationFlag
        flags = 1 << int(flag.STRONGLY_TYPED)
        if plugins:
            flags |= 1 << int(flag.PREFER_AOT_PYTHON_PLUGINS)
            register_plugins(importlib.import_module("tensorrt.plugin"))
        self.network = self.builder.create_network(flags)
        self._parser = trt.OnnxParser(self.network, self._logger)  # owns the weights: it must outlive the network
        if not Path(path).is_file():
            raise ExportError(f"{path}: no such file")
        if not self._parser.parse_from_file(str(path)):
            errors = (self._parser.get_error(i) for i in range(self._parser.num_errors))
            raise ExportError(f"{path}: " + "; ".join(f"node {e.node()}: {e.desc()}" for e in errors))

    def inputs(self) -> list[Any]:
        return [self.network.get_input(i) for i in range(self.network.num_inputs)]


def build_engine(
    onnx_path: str | Path,
    path: str | Path,
    *,
    profile: Profile,
    runtime: str = "tensorrt_rtx",
    compute_capabilities: Sequence[str] = (),
) -> Path:
    """Build an engine from a graph that was exported with `target="tensorrt"`, or "tensorrt_plugin" for runtime "tensorrt".

    Args:
        onnx_path: the graph.
        path: the engine file to write.
        profile: for each input with a dynamic size its (smallest, usual, largest) shape.
        runtime: "tensorrt_rtx" or "tensorrt".
        compute_capabilities: TensorRT-RTX only, such as ("SM86", "SM120"); empty: the GPU at hand.

    Raises:
        ExportError: the parser or the builder refuses; the message holds their words.
        ValueError: unknown runtime or capability, or a profile that does not fit the inputs.
    """
    trt = load_runtime(runtime)
    parsed = Parsed(onnx_path, trt, plugins=_takes_plugins(onnx_path, runtime))
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # node names stay in the engine
    _set_capabilities(config, trt, compute_capabilities)
    config.add_optimization_profile(_optimization_profile(parsed, profile))
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if engine is None:
        raise ExportError(f"{onnx_path}: {runtime} could not build: " + "; ".join(parsed.messages))
    Path(path).write_bytes(bytes(engine))
    return Path(path)


def _takes_plugins(path: str | Path, runtime: str) -> bool:
    """Whether the graph's attention is plugins.

    Raises:
        ExportError: it was exported for another runtime. A graph for ONNX Runtime parses, but its bodies differ by overload,
            which TensorRT ignores: a wrong result. TensorRT-RTX has no plugins.
    """
    model = load_model(path)
    target = metadata(model).get("tsa_compile.target")
    if any(f.overload for f in model.functions) or target not in (None, "tensorrt", "tensorrt_plugin"):
        raise ExportError(f'{path}: exported for {target or "another runtime"}; export it with target="tensorrt"')
    if target == "tensorrt_plugin" and runtime != "tensorrt":
        raise ExportError(f'{path}: exported with target="tensorrt_plugin"; {runtime} has no plugins: use target="tensorrt"')
    return target == "tensorrt_plugin"


def _set_capabilities(config: Any, trt: ModuleType, names: Sequence[str]) -> None:
    if not names:
        return
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise ValueError("compute_capabilities is for tensorrt_rtx; tensorrt builds for the GPU at hand")
    allowed = [n for n in known.__members__ if n.startswith("SM")]
    for name in names:
        if name not in allowed:
            raise ValueError(f"tensorrt_rtx builds for {allowed}, not for {name!r}")
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(known.__members__[name], i)


def _optimization_profile(parsed: Parsed, profile: Profile) -> Any:
    made = parsed.builder.create_optimization_profile()
    dynamic = {t.name: tuple(t.shape) for t in parsed.inputs() if -1 in tuple(t.shape)}
    if set(dynamic) != set(profile):
        raise ValueError(f"profile is for {sorted(profile)}; the inputs with a dynamic size are {sorted(dynamic)}")
    for name, shape in dynamic.items():
        for candidate in profile[name]:
            if len(candidate) != len(shape) or any(s not in (-1, c) for s, c in zip(shape, candidate, strict=True)):
                raise ValueError(f"profile of {name!r}: {tuple(candidate)} does not fit {shape}")
        made.set_shape(name, *(tuple(c) for c in profile[name]))
    return made


def _logger(trt: ModuleType, messages: list[str]) -> Any:
    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.Logger.WARNING:
                messages.append(message)

    return Logger()


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
    settings: dict[str, Any] = {"profile": profile, "runtime": runtime, "compute_capabilities": compute_capabilities}
    if isinstance(model_or_onnx, (str, Path)):
        if onnx_options:
            raise ValueError(f"{sorted(onnx_options)} belong to the export of a model; this is a file already")
        return build_engine(model_or_onnx, path, **settings)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        export_onnx(model_or_onnx, args or (), graph, target="tensorrt_plugin" if plugins else "tensorrt", **onnx_options)
        return build_engine(graph, path, **settings)
