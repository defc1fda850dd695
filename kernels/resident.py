"""Attention to the keys that are on the device, where the rest of a sequence lies in host memory (arXiv 2606.09079).

Who keeps the sequence may look at a call from outside of graphs, and may add what it finds among the other keys.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import torch

from tsa_compile.kernels.types import Attended

Tensor = torch.Tensor
Watcher = Callable[[Tensor, Tensor, float, Attended], Attended]  # (q, k, scale, what was found) -> what to return
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("_watcher", default=None)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, each call of `tsa::resident_attention` passes by `watcher`; a recorded call that is replayed does not."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def resident_attention(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`tsa::resident_attention` on any device: one query row to every key that `key_mask` shows."""
    out, lse, _ = torch.ops.tsa.decode_attention(q, k, v, None, 1, start, lengths, key_mask, scale, causal=False)
    watcher = _watcher.get()
    return (out, lse) if watcher is None else watcher(q, k, scale, Attended(out, lse))
