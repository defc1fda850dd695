"""PTX of the plugin kernels (tensorrt_device.py), as TensorRT's ahead-of-time plugins launch it.

TensorRT passes a kernel its inputs, int32 sizes and outputs, and nothing else. Triton adds two pointers to scratch memory at
the end of every kernel; where none is needed they are unread, and are taken out of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tsa_compile.export.common import ExportError
from tsa_compile.export.native.aot import compile_triton
from tsa_compile.export.native.aot_form import TYPES, parameters
from tsa_compile.kernels.common.tiles import LOG2_E, precision, prefill_config, strip_config

SIZES = ("heads", "kv_heads", "q_len", "k_len", "heavy")
_POINTERS = {"indices": "*i32", "counts": "*i32", "slots": "*i32", "heavy_indices": "*i32", "lse": "*fp32", "part_lse": "*fp32"}


class PluginKernel(NamedTuple):
    """entry: its name in `ptx`. block_m: rows of a program, for the grid. shared: bytes of shared memory of a program."""

    entry: str
    ptx: str
    block_m: int
    threads: int
    shared: int


def plugin_function(name: str) -> Any:
    """The kernel of plugin "sparse_prefill", "sparse_prefill_lse" or "sparse_strip"."""
    from tsa_compile.export.tensorrt_engine import plugin_device as device

    return {
        "sparse_prefill": device.prefill_plugin_kernel,
        "sparse_prefill_lse": device.prefill_lse_plugin_kernel,
        "sparse_strip": device.strip_plugin_kernel,
    }[name]


def plugin_constants(
    name: str, dtype: torch.dtype, dim: int, v_dim: int, settings: Mapping[str, float], capability: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """(compile-time parameters, compile options); `settings`: the node's attributes `scale`, and of a strip `window`, `sinks`."""
    block_d, block_dv = (max(16, 1 << (d - 1).bit_length()) for d in (dim, v_dim))
    choose = strip_config if name == "sparse_strip" else prefill_config
    config = choose(max(block_d, block_dv), dtype, capability)
    constants = {
        "SCALE_LOG2": settings["scale"] * LOG2_E, "D": dim, "DV": v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": precision(dtype),
    }  # fmt: skip
    if name == "sparse_strip":
        constants |= {"WINDOW": settings["window"], "SINKS": settings["sinks"]}
    return constants, config.options


def compile_plugin(
    name: str, dtype: torch.dtype, dim: int, v_dim: int, settings: Mapping[str, float], capability: tuple[int, int]
) -> PluginKernel:
    """Compile a plugin's kernel; PTX of one compute capability runs on all later ones.

    Raises:
        ExportError: the text is not what TensorRT can launch.
    """
    function = plugin_function(name)
    constants, options = plugin_constants(name, dtype, dim, v_dim, settings, capability)
    names = [p for p in parameters(function) if p not in constants]
    types = {p: "i32" if p in SIZES else _POINTERS.get(p, f"*{TYPES[dtype]}") for p in names}
    pointers = [p for p, kind in types.items() if kind.startswith("*") and p != "counts"]
    made = compile_triton(function, types, constants, pointers, options, capability)
    m = made.metadata
    ptx = without_scratch(made.asm["ptx"], m.name, len(names))
    return PluginKernel(m.name, ptx, constants["BLOCK_M"], 32 * m.num_warps, m.shared)


def without_scratch(ptx: str, entry: str, count: int) -> str:
    """`ptx` without the two scratch parameters that follow the kernel's `count` own ones.

    Raises:
        ExportError: there are not `count` + 2 parameters, or the last two are read.
    """
    head = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    declared = re.findall(r"\.param[^,)]*", head.group(1)) if head else []
    if head is None or len(declared) != count + 2:
        raise ExportError(f"{entry}: {len(declared)} parameters in the PTX, expected {count} and two of Triton's own")
    rest = ptx[head.end() :]
    for hidden in (f"{entry}_param_{count}", f"{entry}_param_{count + 1}"):
        if re.search(rf"\b{hidden}\b", rest):
            raise ExportError(f"{entry}: reads Triton's scratch parameter {hidden}")
    kept = ",\n\t".join(d.strip() for d in declared[:count])
    return f"{ptx[: head.start(1)]}\n\t{kept}\n{ptx[head.end(1) :]}"
