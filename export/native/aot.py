"""Compiles the kernels of the native library with Triton's ahead-of-time tooling, for the C++ code to include.

No GPU is needed. Each kernel becomes a cubin for each compute capability asked for, and one PTX text for 8.0, which the
driver compiles on any newer GPU that has no cubin of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tsa_compile.export.common import ExportError, require
from tsa_compile.export.native.aot_form import AotKernel, Form, parameters
from tsa_compile.export.native.aot_kernels import kernels_of

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
SHARED = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}  # bytes a program
PTX = (0, 0)  # stands for PTX in place of a compute capability
_DTYPES = {"fp32": "ort::kFloat", "fp16": "ort::kFloat16", "bf16": "ort::kBFloat16"}


@dataclasses.dataclass(frozen=True)
class Image:
    """A compiled kernel: machine code for `capability`, or PTX."""

    kernel: AotKernel
    capability: tuple[int, int]
    data: bytes
    entry: str
    shared: int
    threads: int


def compile_kernel(kernel: AotKernel, capability: tuple[int, int]) -> Image:
    """Compile one kernel; `PTX` gives the text for compute capability 8.0.

    Raises:
        ExportError: it needs more shared memory than such a GPU gives a program.
    """
    target = capability if capability != PTX else (8, 0)
    made = compile_triton(kernel.function, kernel.types(), kernel.constants, kernel.divisible(), kernel.options, target)
    m = made.metadata
    if m.shared > SHARED.get(target, m.shared):
        raise ExportError(f"{m.name} for {target[0]}.{target[1]}: needs {m.shared} bytes of shared memory of {SHARED[target]}")
    data = made.asm["ptx"].encode() + b"\0" if capability == PTX else made.asm["cubin"]
    return Image(kernel, capability, data, m.name, m.shared, 32 * m.num_warps)


def compile_triton(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Iterable[str],
    options: Mapping[str, int],
    capability: tuple[int, int],
) -> Any:
    """Triton's compiled kernel for a GPU that need not be there.

    Args:
        function: a Triton or Gluon kernel.
        types, constants: of its run-time and compile-time parameters, by name.
        divisible: run-time parameters that are multiples of 16.
        options: `num_warps`, `num_stages`, `maxnreg`.

    Raises:
        ExportError: the kernel needs scratch memory, which a plain launch does not give.
    """
    triton = require("triton", "triton")
    compiler = require("triton.backends.compiler", "triton")
    names = parameters(function)
    source = _source_class(function)(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)},
    )
    target = compiler.GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    made = triton.compile(source, target=target, options=dict(options))
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size:
        raise ExportError(f"{made.metadata.name}: needs scratch memory that a plain launch does not give")
    return made


def _source_class(function: Any) -> Any:
    from triton.compiler import ASTSource

    if type(function).__name__ != "GluonJITFunction":
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def compile_forms(forms: Iterable[Form], capabilities: Sequence[tuple[int, int]], folder: Path) -> None:
    """Write `kernel_names.h`, `kernels.h` and `kernels.bin` for csrc/ into `folder`."""
    images: list[Image] = []
    for form in sorted(set(forms)):
        for capability in (*capabilities, PTX):
            target = capability if capability != PTX else (8, 0)
            images += [compile_kernel(kernel, capability) for kernel in kernels_of(form, target)]
    write_images(images, folder)


def write_images(images: Sequence[Image], folder: Path) -> None:
    """The headers and the blob of these images."""
    blob, rows = bytearray(), []
    for image in images:
        f, start = image.kernel.form, len(blob)
        blob += image.data
        blob += b"\0" * (-len(blob) % 64)
        fields = (
            f"Kernel::{image.kernel.name}", _DTYPES[f.dtype], f.dim, f.v_dim, f.last_queries, int(f.masked), int(f.strip),
            f.group, image.capability[0] * 10 + image.capability[1], json.dumps(image.entry), start, image.shared,
            image.threads, *image.kernel.blocks,
        )  # fmt: skip
        rows.append("  {" + ", ".join(map(str, fields)) + "},")
    (folder / "kernels.bin").write_bytes(blob)
    (folder / "kernel_names.h").write_text(_names(every_kernel()))
    (folder / "kernels.h").write_text(_tables(every_kernel(), rows))


def every_kernel() -> dict[str, AotKernel]:
    """Each kernel that csrc/cuda.cc launches, in one of its forms: the run-time parameters are the same in all."""
    form = Form.of(torch.float16, 64, 64, 128, masked=True, strip=True, group=1)
    return {k.name: k for capability in ((8, 0), (9, 0)) for k in kernels_of(form, capability)}


def _names(kernels: Iterable[str]) -> str:
    enum = "enum class Kernel { " + ", ".join(kernels) + " };"
    return "\n".join(["// Written by tsa_compile.export.native.aot.", "#pragma once", "namespace tsa {", enum, "}", ""])


def _tables(kernels: dict[str, AotKernel], images: Sequence[str]) -> str:
    """The kernels' parameters, in order, each with the member of `Values` that it takes; and the images."""
    cases = [f"    case Kernel::{name}: return {{k_{name}, std::size(k_{name})}};" for name in kernels]
    return "\n".join(
        [
            "// Written by tsa_compile.export.native.aot.",
            *(f"const Parameter k_{name}[] = {{{_parameters(kernel)}}};" for name, kernel in kernels.items()),
            "std::pair<const Parameter*, size_t> parameters_of(Kernel kernel) {",
            "  switch (kernel) {",
            *cases,
            "  }",
            '  throw std::logic_error("no such kernel");',
            "}",
            "const Image kImages[] = {",
            *images,
            "};",
            "",
        ]
    )


def _parameters(kernel: AotKernel) -> str:
    made = ("pointer" if kind.startswith("*") else kind for kind in kernel.types().values())
    members = (kernel.binds.get(name, name) for name in kernel.types())
    return ", ".join(f"{kind}(&Values::{member})" for kind, member in zip(made, members, strict=True))


def run(forms: Iterable[Form], capabilities: Sequence[tuple[int, int]], folder: Path) -> None:
    """`compile_forms` in a process of its own: kernels imported under TRITON_INTERPRET=1 cannot be compiled.

    Raises:
        ExportError: the compiler fails; the message holds its last lines.
    """
    job = {"forms": [dataclasses.astuple(f) for f in forms], "capabilities": list(capabilities), "folder": str(folder)}
    code = "import sys, tsa_compile.export.native.aot as aot; aot.main(sys.argv[1])"
    env = _environment()
    done = subprocess.run([sys.executable, "-c", code, json.dumps(job)], capture_output=True, text=True, env=env)
    if done.returncode:
        said = done.stderr.partition("nanobind: leaked")[0]  # what Triton 3.9 adds about itself
        raise ExportError("compiling the CUDA kernels failed:\n" + "\n".join(said.splitlines()[-20:]))


def _environment() -> dict[str, str]:
    """This process's, with this project importable, without the interpreter and without line tables in the cubins."""
    import os

    import tsa_compile

    root = str(Path(tsa_compile.__file__).parents[1])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**env, "PYTHONPATH": os.pathsep.join([root, env.get("PYTHONPATH", "")]), "TRITON_DISABLE_LINE_INFO": "1"}


def main(job: str) -> None:
    """What `run` starts."""
    told = json.loads(job)
    capabilities = [tuple(c) for c in told["capabilities"]]
    compile_forms([Form(*f) for f in told["forms"]], capabilities, Path(told["folder"]))
