"""What the native library is built of: forms of attention sites, and kernels with their compile-time constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTERS = {
    "lse": "*fp32", "part_lse": "*fp32", "part_max": "*fp32", "part_sum": "*fp32", "mean": "*fp32", "scores": "*fp32",
    "gathered": "*fp32", "masses": "*i64", "candidates": "*i64", "mass_bins": "*i64", "key_mask": "*u8",
}  # fmt: skip
_INDICES = ("indices", "counts", "heavy_indices", "slots", "order", "ranks", "bins", "cuts", "through", "queue")
_POINTERS.update(dict.fromkeys(_INDICES, "*i32"))


@dataclasses.dataclass(frozen=True, order=True)
class Form:
    """What distinguishes the kernels of one site from another's. `group`: query heads of a KV head."""

    dtype: str  # "fp32", "fp16" or "bf16"
    dim: int
    v_dim: int
    last_queries: int
    masked: bool
    strip: bool
    group: int

    @classmethod
    def of(cls, dtype: torch.dtype, dim: int, v_dim: int, last_queries: int, masked: bool, strip: bool, group: int) -> Form:
        return cls(TYPES[dtype], dim, v_dim, last_queries, masked, strip, group)

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
        wide = widths(self.form)
        return pointers | {p for p in types if p[1:] in ("_sb", "_sh", "_sl") and wide.get(p[0], 1) % 16 == 0}

    def _type(self, parameter: str) -> str:
        if parameter in ("q", "k", "v", "out", "part"):
            return f"*{self.form.dtype}"
        if parameter in _POINTERS:
            return _POINTERS[parameter]
        if parameter == "scale_log2":
            return "fp32"
        return "i64" if parameter.endswith(("_sb", "_sh", "_sg")) or parameter == "coverage_bits" else "i32"


def parameters(function: Any) -> list[str]:
    """Names of a Triton kernel's parameters, in order."""
    return [p.name for p in function.params] if hasattr(function, "params") else list(function.arg_names)


def widths(form: Form) -> dict[str, int]:
    """Row width of each tensor, by the first letter of its strides."""
    return {"q": form.dim, "k": form.dim, "v": form.v_dim, "o": form.v_dim, "p": form.v_dim}
