"""What `tsa-compile export` does: a model or an ONNX file in, an artifact and, for ONNX Runtime, its native library out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tsa_compile import export
from tsa_compile.export.language_model import Graph, language_graph, plan_within
from tsa_compile.plan import Plan
from tsa_compile.progress import step

TARGETS = ("onnx", "tensorrt", "aoti")
SUFFIXES = {"onnx": ".onnx", "tensorrt": ".engine", "aoti": ".pt2"}


@dataclasses.dataclass(frozen=True)
class Request:
    """The command's options; `capabilities` such as "8.6" (GPUs of the native library or of a TensorRT-RTX engine)."""

    to: str
    out: Path
    plan: Plan
    graph: str = "prefill"
    form: str = "portable"
    tokens: int = 512
    max_tokens: int = 8192
    max_batch: int = 4
    native: bool = False
    cuda: bool = False
    check: bool = True
    runtime: str = "tensorrt_rtx"
    capabilities: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ValueError(f"--to must be one of {', '.join(TARGETS)}, got {self.to!r}")
        if self.out.suffix != SUFFIXES[self.to]:
            raise ValueError(f"--out must end in {SUFFIXES[self.to]} for --to {self.to}, got {str(self.out)!r}")
        if (self.native or self.form == "custom") and self.to != "onnx":
            raise ValueError(f"--native and --form custom are for --to onnx, not for {self.to}")
        if self.cuda and not self.native:
            raise ValueError("--cuda adds CUDA kernels to the library that --native builds; pass --native")
        if self.graph == "decode" and self.to != "onnx":
            raise ValueError(f"--graph decode is for --to onnx, not for {self.to}")
        for name in self.capabilities:
            parse_capability(name)


def parse_capability(name: str) -> tuple[int, int]:
    """ "8.6" -> (8, 6)."""
    major, dot, minor = name.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise ValueError(f"a compute capability is written like 8.6, got {name!r}")
    return int(major), int(minor)


def export_model(model: Any, request: Request, console: Console) -> list[Path]:
    """Export `model`, a transformers causal language model; returns the files written."""
    export_graph = language_graph(model, request.graph, request.tokens)
    files = [request.out]
    with step(f"export to {request.out}", console):
        _export_graph(export_graph, request)
    if request.native:
        files.append(build_native(request.out, request, console))
    if request.to == "onnx" and request.check:
        _check(export_graph, request, files[1:], console)
    return files


def _export_graph(graph: Graph, request: Request) -> None:
    options: dict[str, Any] = {"policy": plan_within(request.plan), "dynamic_shapes": graph.dynamic_shapes}
    if request.to == "aoti":
        export.aoti(graph.module, graph.args, request.out, **options)
        return
    options |= {"input_names": graph.input_names, "output_names": graph.output_names}
    if request.to == "onnx":
        options |= {"form": request.form, "require_sites": request.graph == "prefill"}
        export.onnx(graph.module, graph.args, request.out, **options)
    else:
        export.tensorrt(graph.module, graph.args, request.out, **engine_options(request), **options)


def engine_options(request: Request) -> dict[str, Any]:
    """Profile, runtime and GPUs of an engine of a prefill graph."""
    sizes = ((1, 2), (1, request.tokens), (request.max_batch, request.max_tokens))
    capabilities = [f"SM{major}{minor}" for major, minor in map(parse_capability, request.capabilities)]
    return {"profile": {"input_ids": sizes}, "runtime": request.runtime, "compute_capabilities": capabilities}


def export_file(path: Path, request: Request, console: Console) -> list[Path]:
    """Go on from an ONNX file that was exported before: build its native library, or a TensorRT engine of it."""
    if request.to == "tensorrt":
        with step(f"build {request.out}", console):
            return [export.tensorrt(path, None, request.out, **engine_options(request))]
    if not request.native:
        raise ValueError(f"{path} is an ONNX file already: pass --native for its library, or --to tensorrt for an engine")
    return [build_native(path, request, console)]


def build_native(model: Path, request: Request, console: Console) -> Path:
    """`libtsa_ort.so` for the sites of the ONNX file `model`, beside `request.out`; built once, then from the cache."""
    from tsa_compile.export import native

    forms = native.forms_of(model) if request.cuda else ()
    kind = f"{len(forms)} forms of CUDA kernels" if forms else "CPU"
    with step(f"build libtsa_ort.so ({kind})", console):
        built = native.build_library(forms, [parse_capability(c) for c in request.capabilities])
        return Path(shutil.copy(built, request.out.parent / built.name))


def _check(graph: Graph, request: Request, libraries: Sequence[Path], console: Console) -> None:
    """Run the file on ONNX Runtime's CPU provider at another length than it was exported at, and compare."""
    library = libraries[0] if libraries else None
    if request.form == "custom" and library is None:
        console.print("not checked: the custom form runs with the library that --native builds", markup=False)
        return
    if next(iter(graph.module.parameters())).dtype == torch.bfloat16:
        console.print("not checked: ONNX Runtime's CPU provider has no bfloat16 matrix product", markup=False)
        return
    args = graph.args if request.graph == "decode" else (torch.flip(graph.args[0], (0,))[:1, : max(2, request.tokens * 3 // 4)],)
    with step("run on ONNX Runtime and compare", console):
        result = export.check(request.out, graph.module, args, library=library, atol=1e-3)
    console.print(f"largest difference from PyTorch: {result.worst:.2g}", markup=False)
