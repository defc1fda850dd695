"""Builds `libtsa_ort.so`, the ONNX Runtime operator library behind `form="custom"`, with the system's C++ compiler.

Nothing is downloaded: ONNX Runtime's C ABI is declared by hand in `csrc/ort_abi.h`. Libraries are cached by the hash of
everything that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsa_compile.export.common import ExportError
from tsa_compile.export.onnx_model.node import DOMAIN
from tsa_compile.export.onnx_model.run_onnx import load_model
from tsa_compile.kernels.common.user_cache import user_cache

if TYPE_CHECKING:
    from tsa_compile.export.native.aot_form import Form

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
COMPILERS = ("c++", "g++", "clang++")


def cache_dir() -> Path:
    """Where libraries are kept: `$TSA_COMPILE_CACHE`, or `tsa_compile` in the user's cache folder."""
    base = os.environ.get("TSA_COMPILE_CACHE")
    if base:
        return Path(base)
    return user_cache()


def find_compiler() -> str:
    """`$CXX`, or the first of c++, g++, clang++.

    Raises:
        ExportError: there is none.
    """
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise ExportError(
        f"building libtsa_ort needs a C++17 compiler: none of {', '.join(names)} is on PATH; install one "
        "(Debian, Ubuntu: apt install g++) or name it in CXX"
    )


def build_library(forms: Iterable[Form] = (), capabilities: Sequence[tuple[int, int]] = ()) -> Path:
    """The path of `libtsa_ort.so`, built if the cache has none for these sources, kernels and compiler.

    Args:
        forms: the attention sites whose CUDA kernels it holds (`forms_of` reads them from a file); none: CPU only.
        capabilities: GPUs to compile for, such as ((9, 0),); others newer than 8.0 use PTX. Empty: those of `aot`.

    Raises:
        ExportError: no compiler, or a compiler fails; the message holds its output.
    """
    forms, compiler = sorted(set(forms)), find_compiler()
    flags = [*FLAGS, *(["-DTSA_CUDA"] if forms else [])]
    key = [_version(compiler), flags, forms, sorted(capabilities)]
    digest = hashlib.sha256(repr(key).encode())
    for file in [*sorted(SOURCES.iterdir()), *(_kernel_sources() if forms else [])]:
        digest.update(file.name.encode() + file.read_bytes())
    library = cache_dir() / "native" / digest.hexdigest()[:16] / "libtsa_ort.so"
    if not library.is_file():
        _build(compiler, flags, forms, capabilities, library)
    return library


def forms_of(path: str | Path) -> list[Form]:
    """The forms of the attention sites of an exported ONNX file; what `build_library` must hold to run it on CUDA.

    Raises:
        ExportError: the file does not load, has no sites, or does not say their heads and head dims.
    """
    import torch

    from tsa_compile.export.native.aot_form import Form

    model = load_model(path)
    known = {v.name: v.type.tensor_type for v in [*model.graph.value_info, *model.graph.input, *model.graph.output]}
    dtypes = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}
    forms = set()
    for node in (n for n in model.graph.node if n.domain == DOMAIN):
        ints = {a.name: a.i for a in node.attribute}
        kinds = [known.get(name) for name in (node.input[0], node.input[2])]
        shapes = [[d.dim_value for d in kind.shape.dim] if kind else [] for kind in kinds]
        if not all(len(shape) == 4 and shape[1] and shape[3] for shape in shapes):
            raise ExportError(f"{path}: node {node.name}: the file does not say its heads and head dims")
        masked = len(node.input) > 3 and bool(node.input[3])
        strip = any(ints.get(name, 0) for name in ("strip_window", "strip_sinks", "heavy"))
        (_, heads, _, dim), (_, kv_heads, _, v_dim) = shapes
        dtype = dtypes.get(kinds[0].elem_type if kinds[0] else 0)
        if dtype is None:
            raise ExportError(f"{path}: node {node.name}: the kernels take float32, float16 and bfloat16")
        forms.add(Form.of(dtype, dim, v_dim, ints["window"], masked, strip, heads // kv_heads))
    if not forms:
        raise ExportError(f"{path}: no node of {DOMAIN} in it")
    return sorted(forms)


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if done.returncode:
        raise ExportError(f"{compiler} --version failed: {done.stderr}")
    return done.stdout


def _kernel_sources() -> list[Path]:
    """Everything that the compiled kernels depend on."""
    from tsa_compile.kernels import ops

    folder = Path(ops.__file__).parent
    return [*sorted(folder.rglob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]


def _build(compiler: str, flags: list[str], forms: list[Form], capabilities: Sequence[tuple[int, int]], library: Path) -> None:
    """Compile beside the target and rename: another process never sees half a library."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        if forms:
            from tsa_compile.export.native import aot

            aot.run(forms, capabilities or aot.CAPABILITIES, Path(folder))
        compile_sources(compiler, flags, Path(folder)).replace(library)


def compile_sources(compiler: str, flags: Sequence[str], folder: Path) -> Path:
    """Compile csrc/ in `folder`, where `kernels.h` and `kernels.bin` lie if CUDA is built; returns the library."""
    sources = [str(s) for s in sorted(SOURCES.glob("*.cc"))]
    command = [compiler, *flags, "-I.", *sources, "-o", "libtsa_ort.so", "-ldl", "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise ExportError(f"{' '.join(command)} failed:\n{done.stderr}")
    return folder / "libtsa_ort.so"
