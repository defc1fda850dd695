"""The progress bar of `calibrate` and of every command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
Start = Callable[[str, int], "Advance"]


class Advance(Protocol):
    """One step is done; `text`, if any, is what the bar says from now on."""

    def __call__(self, text: str | None = None) -> None: ...


@contextlib.contextmanager
def progress(console: Console | None = None, show: bool = True) -> Iterator[Start]:
    """Bars on `console` (None: stderr); yields start(text, total), which adds a bar and gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True), disable=not show) as shown:

        def start(text: str, total: int) -> Advance:
            task = shown.add_task(text, total=total)
            return lambda text=None: shown.update(task, advance=1, description=text)

        yield start


@contextlib.contextmanager
def told(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """One bar; yields the function that advances it and says what is done, where there is no terminal in a line of its own."""
    with progress(console) as start:
        bar = start("", total)

        def advance(what: str) -> None:
            bar(what)
            if not console.is_terminal:
                console.print(f"{time.strftime('%H:%M:%S')} {what}", markup=False, highlight=False)

        yield advance


@contextlib.contextmanager
def step(text: str, console: Console) -> Iterator[None]:
    """A bar of one step, done when the block ends."""
    with progress(console) as start:
        advance = start(text, 1)
        yield
        advance()


def track(items: Iterable[T], text: str, total: int, console: Console) -> Iterator[T]:
    """`items`, with a bar that advances after each."""
    with progress(console) as start:
        advance = start(text, total)
        for item in items:
            yield item
            advance()
