"""Copies from the host that run beside what is computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def copying(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Inside, copies to a GPU run on a stream of their own, behind what was asked for before; yields what says: they are done."""
    if device.type != "cuda":
        yield lambda: True
        return
    stream, event = _stream(device), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield event.query
        event.record()


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
