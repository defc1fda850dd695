"""Buffers that outlive one request: a cache leases a storage of its batch and capacity, and gives it back when it is collected.

Buffers keep their addresses from one lease to the next, so a captured graph that was recorded over a storage serves every
cache that leases it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch

from tsa_compile.cache.kv_state import KvSize, KvStates

FIRST = 1024
CHUNK = 4096


def capacity_for(rows: int) -> int:
    """The capacity bucket that holds `rows` rows: 1K, 2K, 4K, then by chunks of 4K or an eighth, whichever is larger."""
    capacity = FIRST
    while capacity < rows:
        capacity += min(capacity, max(CHUNK, capacity // 8 // 64 * 64))
    return capacity


class Buffers(NamedTuple):
    """One layer's tensors in a storage.

    Args:
        keys: `[batch, kv_heads, capacity, head_dim]`; rows beyond the layer's length hold anything.
        values: `[batch, kv_heads, capacity, v_head_dim]`.
        states: tensors of each state, by the state's and the field's name.
    """

    keys: torch.Tensor
    values: torch.Tensor
    states: dict[str, dict[str, torch.Tensor]]


class Storage:
    """The buffers of all layers of one cache.

    Args:
        batch: rows of the batch.
        capacity: cache rows that every full layer holds.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch = batch
        self.capacity = capacity
        self.layers: dict[int, tuple[KvSize, tuple[str, ...], Buffers]] = {}

    def buffers(self, layer: int, size: KvSize, states: KvStates) -> Buffers:
        """The layer's buffers, made at its first use, or anew where the size or the kinds of state are others than before."""
        names = tuple(kind.name for kind in states.kinds)
        held = self.layers.get(layer)
        if held is None or held[:2] != (size, names):
            with torch.inference_mode(False):  # a tensor of inference mode has no version counter
                shape = (size.batch, size.kv_heads, size.capacity)
                keys = torch.empty((*shape, size.head_dim), dtype=size.dtype, device=size.device)
                values = torch.empty((*shape, size.v_head_dim), dtype=size.v_dtype, device=size.device)
                held = (size, names, Buffers(keys, values, states.allocate(size)))
            self.layers[layer] = held
        return held[2]

    def drop_seen(self) -> None:
        """Forget buffers that someone still looks at: a view of keys may outlive its cache, and must keep its values."""
        self.layers = {n: held for n, held in self.layers.items() if not any(_is_seen(t) for t in held[2][:2])}


def _is_seen(tensor: torch.Tensor) -> bool:
    """Does a tensor other than `tensor` itself use its memory?"""
    return _uses(tensor) > _uses(torch.empty(1))


def _uses(tensor: torch.Tensor) -> int:
    """Tensors and storage objects on the tensor's memory; the object made here is one."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


class Pool:
    """Storages that no cache uses now, by (batch, capacity). Requests may come from several threads.

    Args:
        keep: unused storages that are kept at most, the latest; the rest is freed.
    """

    def __init__(self, keep: int = 1) -> None:
        if keep < 0:
            raise ValueError(f"keep: {keep} is no number of storages; allowed: 0 or more")
        self.keep = keep
        self._free: list[Storage] = []
        self._returned: deque[Storage] = deque()
        self._lock = threading.Lock()

    def lease(self, batch: int, capacity: int) -> Storage:
        """An unused storage of this batch and capacity, or a new one."""
        with self._lock:
            self._sort_in()
            for storage in reversed(self._free):
                if (storage.batch, storage.capacity) == (batch, capacity):
                    self._free.remove(storage)
                    break
            else:
                return Storage(batch, capacity)
        storage.drop_seen()
        return storage

    def give_back(self, storage: Storage) -> None:
        """May run in the garbage collector, at any point of any thread: so it never waits for the lock."""
        self._returned.append(storage)
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def clear(self) -> None:
        """Free every storage that no cache uses."""
        with self._lock:
            self._returned.clear()
            self._free.clear()

    def __len__(self) -> int:
        """Unused storages that are kept."""
        with self._lock:
            self._sort_in()
            return len(self._free)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        return self

    def _sort_in(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        del self._free[: max(0, len(self._free) - self.keep)]


class Lease:
    """What one cache holds of a pool. Shared by the cache's layers, which move to a larger storage one after the other.

    Args:
        pool: where storages come from.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.storage: Storage | None = None
        self.key_mask: torch.Tensor | None = None  # bool [B, rows] of the running call; each layer takes it with its rows
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
