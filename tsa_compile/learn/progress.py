"""A progress bar on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[], None]
Start = Callable[[str, int], Advance]


@contextlib.contextmanager
def bar(show: bool) -> Iterator[Start]:
    """A progress bar; yields start(text, total), which gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:

        def start(text: str, total: int) -> Advance:
            task = progress.add_task(text, total=total)
            return lambda: progress.advance(task)

        yield start
