"""Options of commands that are lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

N = TypeVar("N", int, float)


def numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """The numbers of a comma separated option.

    Raises:
        ValueError: something else is in it; the message names the option.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        words = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} must be {words}, comma separated, got {text!r}") from error
