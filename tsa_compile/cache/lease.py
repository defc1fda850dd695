"""What one cache holds of a pool of storages."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from tsa_compile.cache.storage import Pool, Storage, capacity_for


class Padding(NamedTuple):
    """Which rows are padding: the first ones alone, `rows[b]` of batch row b, int32 `[B]`; None: there is none."""

    rows: torch.Tensor | None


class Lease:
    """What one cache holds of a pool. Shared by the cache's layers, which move to a larger storage one after the other.

    Args:
        pool: where storages come from.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.storage: Storage | None = None
        self.key_mask: torch.Tensor | None = None  # bool [B, rows] of the running call; each layer takes it with its rows
        self.positions: torch.Tensor | None = None  # int [B or 1, new] of the running call's rows, if it says them
        self.numbered = True  # if it does not: do rows stand where their numbers are?
        self.padding: Padding | None = None  # of the running call, if its caller has told it
        self.layers = 0
        self._expected: tuple[int, int] | None = None
        self._users: dict[Storage, set[int]] = {}
        weakref.finalize(self, _give_back_all, pool, self._users)

    def enter(self) -> int:
        """A number for a new layer."""
        self.layers += 1
        return self.layers - 1

    def fit(self, layer: int, batch: int, rows: int) -> Storage:
        """The storage that `layer` must use to hold `rows` rows: the cache's own, or a new one for all its layers."""
        storage = self.storage
        if self._expected is not None:
            expected, rows = self._expected[0], max(rows, self._expected[1])
            if storage is None and batch != expected:
                raise ValueError(f"batch: the cache was made for {expected} rows of a batch, the call has {batch}")
        if storage is None or storage.batch != batch or storage.capacity < rows:
            storage = self.storage = self.pool.lease(batch, capacity_for(rows))
        self._users.setdefault(storage, set()).add(layer)
        return storage

    def expect(self, batch: int, rows: int) -> None:
        """Take room for `rows` rows from the start, and no other batch."""
        self._expected = (batch, rows)

    def leave(self, layer: int, storage: Storage) -> None:
        """`layer` has its rows elsewhere now; the last layer gives the storage back."""
        users = self._users[storage]
        users.discard(layer)
        if not users:
            del self._users[storage]
            if storage is self.storage:
                self.storage = None
            self.pool.give_back(storage)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        copied = memo[id(self)] = Lease(self.pool)
        copied.layers, copied.key_mask = self.layers, self.key_mask
        return copied


def _give_back_all(pool: Pool, users: dict[Storage, set[int]]) -> None:
    for storage in users:
        pool.give_back(storage)
    users.clear()


def as_rows(positions: Any) -> torch.Tensor | None:
    """A call's `position_ids` `[B or 1, n]`; None: it has none, or in another form."""
    return positions if isinstance(positions, torch.Tensor) and positions.dim() == 2 else None
