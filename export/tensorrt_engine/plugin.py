# mypy: ignore-errors
"""Quickly Deployable Plugins for full TensorRT (10.8 and later): the attention kernels, ahead of time, as PTX in the engine.

TensorRT takes one kernel for each plugin, so a site is a chain: selection by standard operators (they give `indices`,
`counts`, `slots` and `heavy_indices`), then `tsa::sparse_prefill`; or, completed, `tsa::sparse_prefill_lse` and then
`tsa::sparse_strip`.
An engine built from them needs nothing of this project to run. Annotations must be real types here: TensorRT reads them.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from tsa_compile.export.common import ExportError
from tsa_compile.export.tensorrt_engine.plugin_ptx import PluginKernel, compile_plugin

NAMESPACE = "tsa"
PLUGINS = ("sparse_prefill", "sparse_prefill_lse", "sparse_strip")
_DTYPES = {"FLOAT": ("FP32", torch.float32), "HALF": ("FP16", torch.float16), "BF16": ("BF16", torch.bfloat16)}


def register_plugins(trtp: ModuleType) -> None:
    """Register the plugins with `tensorrt.plugin`, once in a process; an ONNX parser then finds them by name."""
    if getattr(trtp, "_tsa_registered", False):
        return
    _register_prefill(trtp, "sparse_prefill", with_lse=False)
    _register_prefill(trtp, "sparse_prefill_lse", with_lse=True)
    _register_strip(trtp)
    trtp._tsa_registered = True


def _register_prefill(trtp: ModuleType, name: str, with_lse: bool) -> None:
    Tensor, Result = trtp.TensorDesc, tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    Outputs = tuple[(Tensor,) * (1 + with_lse)]

    @trtp.register(f"{NAMESPACE}::{name}")
    def describe(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float) -> Outputs:
        out = _result(trtp, q, v)
        if not with_lse:
            return (out,)
        batch, heads, q_len, _ = q.shape_expr
        return out, trtp.from_shape_expr((batch, heads, q_len), _tensorrt().DataType.FLOAT)

    @trtp.autotune(f"{NAMESPACE}::{name}")
    def formats(
        q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, outputs: Outputs
    ) -> list[trtp.AutoTuneCombination]:
        t = _dtype(q)[0]
        return [_combination(trtp, [t, t, t, "INT32", "INT32", t, *["FP32"] * with_lse])]

    @trtp.aot_impl(f"{NAMESPACE}::{name}")
    def implement(
        q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float, outputs: Outputs, tactic: int
    ) -> Result:
        batch, heads, q_len, _ = q.shape_expr
        k_len = k.shape_expr[2]
        kernel = _compile(name, q, v, {"scale": scale})
        tiles = trtp.min(trtp.cdiv(k_len, kernel.block_m), trtp.cdiv(q_len, kernel.block_m) + 1)
        launch = _launch(trtp, kernel, batch * heads * tiles)
        return kernel.entry, kernel.ptx, launch, trtp.SymIntExprs.from_tuple((heads, k.shape_expr[1], q_len, k_len))


def _register_strip(trtp: ModuleType) -> None:
    Tensor, Result = trtp.TensorDesc, tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    Outputs = tuple[(Tensor,)]

    @trtp.register(f"{NAMESPACE}::sparse_strip")
    def describe(
        q: Tensor, k: Tensor, v: Tensor, part: Tensor, part_lse: Tensor, slots: Tensor, heavy_indices: Tensor,
        scale: float, window: int, sinks: int,
    ) -> Outputs:  # fmt: skip
        return (_result(trtp, q, v),)

    @trtp.autotune(f"{NAMESPACE}::sparse_strip")
    def formats(
        q: Tensor, k: Tensor, v: Tensor, part: Tensor, part_lse: Tensor, slots: Tensor, heavy_indices: Tensor, outputs: Outputs
    ) -> list[trtp.AutoTuneCombination]:  # fmt: skip
        t = _dtype(q)[0]
        return [_combination(trtp, [t, t, t, t, "FP32", "INT32", "INT32", t])]

    @trtp.aot_impl(f"{NAMESPACE}::sparse_strip")
    def implement(
        q: Tensor, k: Tensor, v: Tensor, part: Tensor, part_lse: Tensor, slots: Tensor, heavy_indices: Tensor,
        scale: float, window: int, sinks: int, outputs: Outputs, tactic: int,
    ) -> Result:  # fmt: skip
        batch, heads, q_len, _ = q.shape_expr
        kernel = _compile("sparse_strip", q, v, {"scale": scale, "window": window, "sinks": sinks})
        launch = _launch(trtp, kernel, trtp.cdiv(q_len, kernel.block_m) * batch * heads)
        sizes = (heads, k.shape_expr[1], q_len, k.shape_expr[2], heavy_indices.shape_expr[2])
        return kernel.entry, kernel.ptx, launch, trtp.SymIntExprs.from_tuple(sizes)


def _result(trtp: ModuleType, q: Any, v: Any) -> Any:
    batch, heads, q_len, _ = q.shape_expr
    return trtp.from_shape_expr((batch, heads, q_len, v.shape_expr[3]), q.dtype)


def _combination(trtp: ModuleType, types: list[str]) -> Any:
    return trtp.AutoTuneCombination(", ".join(types), ", ".join(["LINEAR"] * len(types)))


def _launch(trtp: ModuleType, kernel: PluginKernel, programs: Any) -> Any:
    return trtp.KernelLaunchParams(grid_x=programs, grid_y=1, block_x=kernel.threads, shared_mem=kernel.shared)


def _compile(name: str, q: Any, v: Any, settings: Mapping[str, float]) -> PluginKernel:
    dims = [x.shape_expr[3] for x in (q, v)]
    if not all(d.is_constant for d in dims):
        raise ExportError(f"tsa::{name}: the head dims must be known when the engine is built")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    return compile_plugin(name, _dtype(q)[1], *(d.constant_value() for d in dims), settings, capability)


def _dtype(x: Any) -> tuple[str, torch.dtype]:
    """TensorRT's name in a combination, and PyTorch's dtype."""
    name = x.dtype.name
    if name not in _DTYPES:
        raise ExportError(f"the plugins take float32, float16 and bfloat16, not {name}")
    return _DTYPES[name]


def _tensorrt() -> Any:
    import tensorrt

    return tensorrt
