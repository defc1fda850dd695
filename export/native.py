"""Builds `libtsa_ort.so`, the ONNX Runtime operator library behind `form="custom"`, with the system's C++ compiler.

Nothing is downloaded: ONNX Runtime's C ABI is declared by hand in `csrc/ort_abi.h`. Libraries are cached by the hash of
everything that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from tsa_compile.export.errors import ExportError

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
COMPILERS = ("c++", "g++", "clang++")


def cache_dir() -> Path:
    """Where libraries are kept: `$TSA_COMPILE_CACHE`, or `tsa_compile` in the user's cache folder."""
    base = os.environ.get("TSA_COMPILE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsa_compile"


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


def build_library() -> Path:
    """The path of `libtsa_ort.so`, built if the cache has none for these sources and this compiler.

    Raises:
        ExportError: no compiler, or it fails; the message holds its output.
    """
    compiler = find_compiler()
    sources = sorted(SOURCES.glob("*.cc"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if version.returncode:
        raise ExportError(f"{compiler} --version failed: {version.stderr}")
    digest = hashlib.sha256(repr((version.stdout, FLAGS)).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    library = cache_dir() / "native" / digest.hexdigest()[:16] / "libtsa_ort.so"
    if not library.is_file():
        _compile(compiler, sources, library)
    return library


def check_library(path: str | Path) -> None:
    """Raise an ExportError unless `path` is a whole shared library: the loader dies on a truncated one."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ExportError(f"{path}: cannot read the operator library ({error.strerror})") from error
    if len(data) < 64 or data[:4] != b"\x7fELF":
        raise ExportError(f"{path}: not a shared library, or damaged")
    sections, (size, count) = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<HH", data, 58)
    if sections + size * count > len(data):  # the section table is the last thing in the file
        raise ExportError(
            f"{path}: the library is damaged: {len(data)} bytes, at least {sections + size * count} expected"
        )


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    """Compile beside the target and rename: another process never sees half a library."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, *map(str, sources), "-o", str(built), "-ldl", "-pthread"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ExportError(f"{' '.join(command)} failed:\n{done.stderr}")
        built.replace(library)
