"""What has been measured, in a JSON file: an interrupted calibration goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = "tsa_compile.learn"
VERSION = 2


class Measured:
    """Results by name, each computed once.

    Args:
        path: the file, written after each result; None: kept in memory only.
        key: what the results depend on.

    Raises:
        ValueError: the file is no state file, or is of a calibration with another key.
    """

    def __init__(self, path: str | Path | None, key: dict[str, Any]) -> None:
        self._path = Path(path) if path is not None else None
        self.key: dict[str, Any] = json.loads(json.dumps(key))  # as it comes back from the file
        self._results: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            self._results = self._load(self._path)

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not a calibration state file ({error})") from error
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ValueError(f"{path}: not a calibration state file of version {VERSION}")
        other = [name for name in self.key if data["key"].get(name) != self.key[name]]
        if other:
            raise ValueError(f"{path}: of another calibration, with another {', '.join(other)}; remove it or name another file")
        results: dict[str, Any] = data["results"]
        return results

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result called `name`, a JSON value; `measure` gives it the first time."""
        if name not in self._results:
            self._results[name] = measure()
            self._save()
        return self._results[name]

    def _save(self) -> None:
        if self._path is None:
            return
        data = {"format": FORMAT, "version": VERSION, "key": self.key, "results": self._results}
        write_whole(self._path, json.dumps(data, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Beside the file, then renamed: an interruption leaves no half of it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)
