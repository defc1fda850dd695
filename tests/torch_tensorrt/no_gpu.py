"""Stands in for a GPU where there is none, so that Torch-TensorRT imports and builds. For tests alone.

Two things are pretended: a GPU's properties, to import the package; and the engine's deserialisation after the build, which asks
for a GPU: the serialised bytes are handed on as they are. One thing is added: the compute capabilities that an engine is for
(`IBuilderConfig.set_compute_capability`), which TensorRT-RTX needs to build for another machine and Torch-TensorRT 2.14 has no
setting for.
"""

from __future__ import annotations

import types
from typing import Any

import torch

CAPABILITIES = ["SM89"]  # what the next engine is built for
NETWORKS: list[Any] = []  # the TRTInterpreter of every engine built, newest last; its network is `.ctx.net`


def import_torch_tensorrt() -> types.ModuleType:
    """`torch_tensorrt`, on a machine without a GPU."""
    properties = types.SimpleNamespace(name="none", major=8, minor=9, total_memory=24 << 30, multi_processor_count=100)
    torch.cuda.get_device_capability = lambda *_: (8, 9)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_name = lambda *_: "none"
    torch.cuda.set_device = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.mem_get_info = lambda *_: (24 << 30, 24 << 30)
    import torch_tensorrt
    import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter

    _name_capabilities(interpreter.TRTInterpreter, interpreter.trt)
    interpreter.trt = _WithoutDevice(interpreter.trt)
    return torch_tensorrt


def _name_capabilities(interpreter: Any, trt: Any) -> None:
    make_config = interpreter._populate_trt_builder_config

    def with_capabilities(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = make_config(self, *args, **kwargs)
        config.num_compute_capabilities = len(CAPABILITIES)
        for i, name in enumerate(CAPABILITIES):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], i)
        NETWORKS.append(self)
        return config

    interpreter._populate_trt_builder_config = with_capabilities


class _Engine:
    """What the conversion asks of an engine."""

    def __init__(self, serialized: Any) -> None:
        self._bytes = bytes(serialized)

    def get_aliased_input_tensor(self, name: str) -> str:
        return ""

    def serialize(self) -> bytes:
        return self._bytes


class _Runtime:
    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, serialized: Any) -> _Engine:
        return _Engine(serialized)


class _WithoutDevice:
    """The tensorrt module, but for its Runtime."""

    Runtime = _Runtime

    def __init__(self, trt: Any) -> None:
        self._trt = trt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)
