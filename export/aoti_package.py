"""AOTInductor: one `.pt2` package that `torch._inductor.aoti_load_package` runs."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tsa_compile.export.common import ExportError
from tsa_compile.export.trace import export_program
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy


def export_aoti(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    policy: Policy | Plan | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    inductor_options: Mapping[str, Any] | None = None,
) -> Path:
    """Compile `model` under any policy ahead of time; returns the package's path, which must end in ".pt2".

    The operators stay calls to `torch.ops.tsa.*`: a process that loads the package must import them, as `load_aoti` does.

    Args:
        model, args, kwargs, policy, dynamic_shapes: as for `export_onnx`.
        inductor_options: Inductor configuration, such as {"max_autotune": True}.

    Raises:
        ExportError: no attention site was replaced.
        ValueError: `path` does not end in ".pt2".
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"an AOTInductor package's name ends in .pt2, got {str(path)!r}")
    program = export_program(model, args, kwargs, policy=policy, dynamic_shapes=dynamic_shapes)
    options = dict(inductor_options or {})
    with torch.no_grad():
        made = torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options or None)
    return Path(made)


def load_aoti(path: str | Path) -> Callable[..., Any]:
    """The model of a package, as a function that checks its inputs.

    A package checks nothing by itself: wrong sizes read memory out of bounds. With AOTI_RUNTIME_CHECK_INPUTS=1, which this
    function sets unless it is set, an input of wrong dtype, or of a size beyond what was exported, raises a RuntimeError.

    Raises:
        ExportError: no such file, or not a package.
    """
    import tsa_compile.kernels.ops  # noqa: F401  (registers the operators)

    if not Path(path).is_file():
        raise ExportError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ExportError(f"{path}: not an AOTInductor package, or damaged")
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
    return torch._inductor.aoti_load_package(str(path))
