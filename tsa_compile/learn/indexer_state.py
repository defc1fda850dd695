"""What a training has done so far, in a file: an interrupted call goes on where it stopped."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tsa_compile.progress import progress as progress_bar

FORMAT = "tsa_compile.indexer 1"


class Learner(Protocol):
    """Weights, and what their training needs."""

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class TrainingState:
    """The pieces of work that are done, their losses, and the layers as they are behind them.

    Args:
        path: the file, written after each piece of work; None: kept in memory only.
        key: what all of it depends on.
        layers: by path; those of the file are read into them.

    Raises:
        ValueError: the file is no such state, or is of a training with another key.
    """

    def __init__(self, path: str | Path | None, key: dict[str, Any], layers: Mapping[str, Learner]) -> None:
        self.done, self.losses = 0, list[float]()
        self._path = None if path is None else Path(path)
        self._key: dict[str, Any] = json.loads(json.dumps(key))
        self._layers = layers
        if self._path is not None and self._path.is_file():
            self._load(self._path)

    def run(self, work: Sequence[Callable[[], list[float]]], what: str, progress: bool) -> None:
        """Each piece of `work`, which returns its losses, but for what is done already.

        Args:
            what: is done, and the losses are, for the progress bar.
            progress: show it, on stderr.
        """
        with progress_bar(show=progress) as start:
            advance = start(what, len(work))
            for number, piece in enumerate(work):
                if number >= self.done:
                    self.did(number + 1, piece())
                advance(f"{what} {self.losses[-1]:.3f}" if self.losses else None)

    def did(self, done: int, losses: list[float]) -> None:
        """So many pieces of work are done."""
        self.done, self.losses = done, [*self.losses, *losses]
        if self._path is None:
            return
        layers = {path: layer.state() for path, layer in self._layers.items()}
        fresh = self._path.with_name(self._path.name + ".new")
        torch.save({"format": FORMAT, "key": self._key, "done": done, "losses": self.losses, "layers": layers}, fresh)
        os.replace(fresh, self._path)

    def _load(self, path: Path) -> None:
        try:
            data = torch.load(path, weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: not the state of a training ({type(error).__name__})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: not the state of a training of this release")
        other = [name for name in self._key if data["key"].get(name) != self._key[name]]
        if other:
            raise ValueError(f"{path}: of another training, with another {', '.join(other)}; remove it or name another file")
        self.done, self.losses = data["done"], data["losses"]
        for name, layer in self._layers.items():
            layer.load(data["layers"][name])
