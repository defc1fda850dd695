"""Runs a function on the ranks of a gloo group, each in a forked process; nothing hangs beyond a limit."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(ranks: int, work: Callable[..., Any], *args: Any, limit: int = 60) -> list[Any]:
    """What `work(*args)` returns on each rank; an exception is returned, as text, in the place of a result.

    Args:
        limit: seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        started = [
            context.Process(target=_rank, args=(Path(folder) / "store", rank, ranks, limit, pipe[1], work, args), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in started:
            process.start()
        for _, sender in pipes:
            sender.close()
        found = [_received(pipe[0], limit) for pipe in pipes]
        for process in started:
            process.join(limit)
            assert process.exitcode is not None, "a rank hangs"
    return found


def _rank(store: Path, rank: int, ranks: int, limit: int, sender: Connection, work: Callable[..., Any], args: Any) -> None:
    logging.disable()  # pytest keeps every message of a trace
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=limit / 2), ranks, rank)
    try:
        result = work(*args)
    except Exception:
        result = "".join(traceback.format_exc())
    file = io.BytesIO()
    torch.save(result, file)
    sender.send_bytes(file.getvalue())
    os._exit(0)


def _received(receiver: Connection, limit: int) -> Any:
    assert receiver.poll(limit), "a rank hangs"
    try:
        return torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
    except EOFError:
        return None  # the rank has ended
