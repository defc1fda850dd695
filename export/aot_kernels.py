"""Which kernels the native library holds for one form of attention site, with their compile-time constants.

Mirrors kernels/*/host.py, fused.py, strip.py and hopper.py; csrc/cuda.cc mirrors the order and the grids of the launches.
tests/export/test_native_cuda.py compares both with what the host code launches, and runs them against the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.sparse_prefill import hopper
from tsa_compile.kernels.sparse_prefill.configs import precision, prefill_config, strip_config
from tsa_compile.kernels.token_scores import hopper as scores_hopper
from tsa_compile.kernels.token_scores import host as token_scores

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTERS = {
    "lse": "*fp32", "part_lse": "*fp32", "part_max": "*fp32", "part_sum": "*fp32", "mean": "*fp32", "scores": "*fp32",
    "gathered": "*fp32", "masses": "*i64", "candidates": "*i64", "mass_bins": "*i64", "key_mask": "*u8",
}  # fmt: skip
_INDICES = ("indices", "counts", "heavy_indices", "slots", "order", "ranks", "bins", "cuts", "through", "queue")
_POINTERS.update(dict.fromkeys(_INDICES, "*i32"))
_STRIP_BINDS = {
    "heavy": "heavy_indices", "n_heavy": "heavy", "window": "strip_window", "sinks": "strip_sinks", "order": "strip_order",
    "ranks": "strip_ranks", "part": "out", "part_lse": "lse", "s_sb": "i_sb", "s_sg": "i_sg", "p_sb": "o_sb", "p_sh": "o_sh",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, order=True)
class Form:
    """What distinguishes the kernels of one site from another's. `group`: query heads of a KV head."""

    dtype: str  # "fp32", "fp16" or "bf16"
    dim: int
    v_dim: int
    window: int
    masked: bool
    strip: bool
    group: int

    @classmethod
    def of(cls, dtype: torch.dtype, dim: int, v_dim: int, window: int, masked: bool, strip: bool, group: int) -> Form:
        return cls(TYPES[dtype], dim, v_dim, window, masked, strip, group)

    @property
    def torch_dtype(self) -> torch.dtype:
        return next(t for t, name in TYPES.items() if name == self.dtype)


@dataclasses.dataclass(frozen=True)
class AotKernel:
    """One kernel to compile: `name` in the C++ code, the Triton function, its constants and compile options.

    blocks: rows and columns of a program, where the grid depends on them.
    binds: run-time parameters that are another member of `Values` (csrc/launch.h) than the one of their own name.
    """

    name: str
    function: Any
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    form: Form
    blocks: tuple[int, int] = (0, 0)
    binds: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def types(self) -> dict[str, str]:
        """Triton type of each run-time parameter."""
        return {p: self._type(p) for p in parameters(self.function) if p not in self.constants}

    def divisible(self) -> set[str]:
        """Parameters that are multiples of 16: pointers of whole allocations, strides of and over rows of 16 elements."""
        types = self.types()
        pointers = {p for p, t in types.items() if t.startswith("*") and p != "counts"}
        wide = _widths(self.form)
        return pointers | {p for p in types if p[1:] in ("_sb", "_sh", "_sl") and wide.get(p[0], 1) % 16 == 0}

    def _type(self, parameter: str) -> str:
        if parameter in ("q", "k", "v", "out", "part"):
            return f"*{self.form.dtype}"
        if parameter == "heavy":  # the list itself where its length is another parameter, else that length
            return "*i32" if "n_heavy" in parameters(self.function) else "i32"
        if parameter in _POINTERS:
            return _POINTERS[parameter]
        if parameter == "scale_log2":
            return "fp32"
        return "i64" if parameter.endswith(("_sb", "_sh", "_sg")) or parameter == "coverage_bits" else "i32"


class ScoreConfig(NamedTuple):
    """Compile-time sizes of the window-score kernels."""

    block_d: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def score_config(dim: int, dtype: torch.dtype, window: int) -> ScoreConfig:
    """What kernels/token_scores/host.py takes for these queries."""
    return ScoreConfig(*token_scores._config(torch.empty(1, 1, 1, dim, dtype=dtype, device="meta"), window))


def takes_hopper(form: Form, capability: tuple[int, int]) -> bool:
    """As `hopper.takes`, for contiguous operands."""
    half, square = form.dtype in ("fp16", "bf16"), form.dim == form.v_dim
    return capability == (9, 0) and half and square and form.dim in hopper.HEAD_DIMS


def parameters(function: Any) -> list[str]:
    """Names of a Triton kernel's parameters, in order."""
    return [p.name for p in function.params] if hasattr(function, "params") else list(function.arg_names)


def kernels_of(form: Form, capability: tuple[int, int]) -> Iterator[AotKernel]:
    """All kernels of a form, for GPUs of one compute capability."""
    from tsa_compile.export.aot_device import rank_kernel
    from tsa_compile.kernels.sparse_prefill.pack_device import invert_kernel, order_kernel

    yield from _scores(form, capability)
    yield from _selection(form)
    yield from _prefill(form, capability)
    if form.masked:
        yield AotKernel("rank", rank_kernel, {"BLOCK": 4096}, {"num_warps": 8}, form)
        yield AotKernel("order", order_kernel, {"BLOCK": 1024}, {}, form, (1024, 0))
    if form.strip:
        yield AotKernel("invert", invert_kernel, {"BLOCK": 1024}, {}, form, (1024, 0), {"s_sb": "i_sb", "s_sg": "i_sg"})
        yield _strip(form, capability)


def _scores(form: Form, capability: tuple[int, int]) -> Iterator[AotKernel]:
    padded = {"PADDED": form.masked}
    if takes_hopper(form, capability) and form.window <= scores_hopper.BLOCK:
        from tsa_compile.kernels.token_scores.hopper_device import score_hopper_kernel
        from tsa_compile.kernels.token_scores.hopper_ring_device import WARPS

        together, stages = scores_hopper.tiles(form.group, form.dim, form.torch_dtype.itemsize)
        constants = {"D": form.dim, "HEADS": together, "STAGES": stages, "SPLITS": scores_hopper.MAX_SPLITS, **padded}
        options, blocks = {"num_warps": WARPS.value}, (together, scores_hopper.BLOCK)
        binds = {"through": "counts"}  # not read by one pass alone
        for name, first in (("score_lse_hopper", True), ("score_mean_hopper", False)):
            one_pass = {**constants, "LSE": first, "MEAN": not first}
            yield AotKernel(name, score_hopper_kernel, one_pass, options, form, blocks, binds)
        return
    from tsa_compile.kernels.token_scores import device as scores

    config = score_config(form.dim, form.torch_dtype, form.window)
    tile = {
        "D": form.dim, "BLOCK_D": config.block_d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "PRECISION": precision(form.torch_dtype),
    }  # fmt: skip
    options, blocks = {"num_warps": config.num_warps, "num_stages": config.num_stages}, (config.block_m, config.block_n)
    for name, function in (("score_lse", scores.score_lse_kernel), ("score_mean", scores.score_mean_kernel)):
        yield AotKernel(name, function, {**tile, **padded, **_row_strides(form, "qk")}, options, form, blocks)


def _selection(form: Form) -> Iterator[AotKernel]:
    from tsa_compile.kernels.token_select import count_device, device, host

    padded = {"PADDED": form.masked}
    pool = {"HEADS": host.POOL_HEADS, "BLOCK": host.POOL_BLOCK, **padded}
    yield AotKernel("pool", count_device.pool_kernel, pool, {"num_warps": host.POOL_WARPS}, form, (host.POOL_BLOCK, 0))
    count = {"BLOCK": host.COUNT_BLOCK, **padded}
    yield AotKernel("count", count_device.count_kernel, count, {"num_warps": host.COUNT_WARPS}, form, (host.COUNT_BLOCK, 0))
    chunk = {"CHUNK": host.CHUNK, "BLOCK": host.SELECT_BLOCK, **padded}
    for name in ("select", "bin", "cut", "write"):
        yield AotKernel(name, getattr(device, f"{name}_kernel"), chunk, {"num_warps": host.SELECT_WARPS}, form, (host.CHUNK, 0))


def _prefill(form: Form, capability: tuple[int, int]) -> Iterator[AotKernel]:
    block_d, block_dv = _block(form.dim), _block(form.v_dim)
    if takes_hopper(form, capability):
        from tsa_compile.kernels.sparse_prefill.hopper_device import sparse_prefill_hopper_kernel as function

        constants: dict[str, int | str] = {"D": form.dim, "STAGES": hopper.STAGES, "STRIP": form.strip, "PACKED": False}
        blocks = (hopper.BLOCK, hopper.BLOCK)
        yield AotKernel("prefill_hopper", function, constants, {"num_warps": 4}, form, blocks, {"lse": "lse_or_out"})
        return
    from tsa_compile.kernels.sparse_prefill.device import sparse_prefill_kernel

    config = prefill_config(max(block_d, block_dv), form.torch_dtype, capability)
    constants = {
        "D": form.dim, "DV": form.v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "STRIP": form.strip, "PRECISION": precision(form.torch_dtype),
    }  # fmt: skip
    options = config.options
    blocks = (config.block_m, config.block_n)
    constants.update(_row_strides(form, "qkvo"))
    yield AotKernel("prefill", sparse_prefill_kernel, constants, options, form, blocks, {"lse": "lse_or_out"})


def _strip(form: Form, capability: tuple[int, int]) -> AotKernel:
    from tsa_compile.kernels.sparse_prefill.strip_device import strip_kernel

    block_d, block_dv = _block(form.dim), _block(form.v_dim)
    config = strip_config(max(block_d, block_dv), form.torch_dtype, capability)
    constants = {
        "D": form.dim, "DV": form.v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "PADDED": form.masked, "PACKED": False, "PRECISION": precision(form.torch_dtype),
    }  # fmt: skip
    options = config.options
    blocks = (config.block_m, config.block_n)
    return AotKernel("strip", strip_kernel, {**constants, **_row_strides(form, "qkvop")}, options, form, blocks, _STRIP_BINDS)


def _row_strides(form: Form, tensors: str) -> dict[str, int]:
    """Strides that contiguous tensors fix: between rows, and (but for outputs) between elements."""
    width = _widths(form)
    strides = {f"{t}_sl": width[t] for t in tensors}
    return {**strides, **{f"{t}_sd": 1 for t in tensors if t in "qkv"}}


def _widths(form: Form) -> dict[str, int]:
    """Row width of each tensor, by the first letter of its strides."""
    return {"q": form.dim, "k": form.dim, "v": form.v_dim, "o": form.v_dim, "p": form.v_dim}


def _block(dim: int) -> int:
    """The power of two, at least 16, that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())
