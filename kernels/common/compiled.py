"""Which kernels Triton compiles while something runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Inside, the list grows by the name of each kernel that Triton makes in this process, in any thread.

    Those that it finds in its cache folder count too: a first launch waits for either. Without Triton the list stays empty, and
    so it does under its interpreter, and for kernels of Inductor's, which come another way.
    """
    found: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield found
        return
    before = knobs.runtime.jit_post_compile_hook

    def told(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs["fn"].name)
        return None if before is None else before(*args, **kwargs)

    knobs.runtime.jit_post_compile_hook = told
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before
