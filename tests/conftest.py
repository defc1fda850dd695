"""Without a GPU, Triton kernels run through Triton's interpreter; tests marked `gpu` are skipped with a reason."""

import functools
import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="tsa-inductor-"))  # no stale graphs


def _patch_the_language_once() -> None:
    """Triton's interpreter puts its functions in the place of the language's at each call of a function inside of a kernel, where
    they are already: a third of its time, most of it `inspect.getmembers`."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version of Triton
    patch: Callable[[Any], Any] = interpreter._patch_lang

    @functools.cache
    def languages(function: Any) -> list[Any]:
        return [module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())]

    def patch_once(function: Any) -> Any:
        there = not any(tl.core.is_builtin(module.load) for module in languages(function))
        return interpreter._LangPatchScope() if there else patch(function)

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    _patch_the_language_once()


def pytest_collection_finish() -> None:
    """What was imported stays, so the garbage collector, which traces start again and again, need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
