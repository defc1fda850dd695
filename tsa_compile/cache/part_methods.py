"""A layer of transformers whose buffers hold a part of its rows: the others are with other ranks, or in host memory."""

from __future__ import annotations

from typing import NoReturn

import torch

from tsa_compile.cache.buffered import Pair, joined
from tsa_compile.cache.layer_methods import FullMethods


class PartMethods(FullMethods):
    """A layer whose buffers hold a part of the rows: a call with many rows sees those of `_joined`.

    Attributes:
        total: rows of the whole sequence; `length` are those in the buffers.
        where: of the other rows, for errors.
    """

    total = 0
    where: str

    def count(self) -> int:
        return self.total + (0 if self._late is None else self._late[0].shape[-2])

    def clear(self) -> None:
        super().clear()
        self.total = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor | None = None) -> Pair:
        """Keep new rows where they belong; returns the rows of the whole sequence."""
        if at is not None or self.lengths is not None:
            self._refuse("batch rows of different lengths")
        self.settle()
        seen = self._joined(keys, values)
        self._store(keys, values)
        return seen

    def set_lengths(self, lengths: torch.Tensor, longest: int) -> NoReturn:
        self._refuse("batch rows of different lengths")

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        raise NotImplementedError

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """New rows of the buffers, behind those that are there."""
        super().append(keys, values)

    def update_traced(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """As `append`, in a traced graph: the rows wait for the end of the call."""
        self._late = keys, values = (keys, values) if self._late is None else joined(self._late, (keys, values))
        return self._joined(keys, values)

    def _joined(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """The rows of the whole sequence so far, and these behind them."""
        raise NotImplementedError

    def _assign(self, which: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            self._refuse("assigned keys or values")
        super()._assign(which, tensor)

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(f"a cache whose rows {self.where} takes no {what}")
