"""Prompts in files, for the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def read_prompts(paths: Iterable[str | Path], tokenizer: Callable[[], Any], max_tokens: int | None = None) -> Iterator[list[int]]:
    """Token ids of each prompt: of a `.jsonl` file one a line (a string, token ids, or an object with "text"), of any other
    file its whole text.

    Args:
        tokenizer: loads the tokenizer; called if a prompt is text.
        max_tokens: longer prompts lose their beginning, so that the end, which is compared, stays.

    Raises:
        ValueError: a line that is none of the three, or a file that is empty or not UTF-8.
        OSError: a file cannot be read.
    """
    loaded: list[Any] = []
    for path in map(Path, paths):
        for where, entry in _entries(path):
            entry = entry.get("text") if isinstance(entry, dict) else entry
            if isinstance(entry, str):
                loaded = loaded or [tokenizer()]
                entry = loaded[0](entry).input_ids
            if not isinstance(entry, list) or not all(type(i) is int for i in entry):
                raise ValueError(f'{where}: expected a string, a list of token ids or an object with "text"')
            yield entry[-max_tokens:] if max_tokens else entry


def read_text(path: str | Path) -> str:
    """The text of a file that a user named.

    Raises:
        ValueError: it has none, or is not UTF-8; the message names the file.
        OSError: it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if path.suffix != ".jsonl":
        yield str(path), text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
