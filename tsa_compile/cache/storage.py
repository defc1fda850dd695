"""Buffers that outlive one request: a cache leases a storage of its batch and capacity, and gives it back when it is collected.

Buffers keep their addresses from one lease to the next, so a captured graph that was recorded over a storage serves every
cache that leases it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import torch

from tsa_compile.cache.kv_state import KvSize
from tsa_compile.cache.layer_states import KvStates
from tsa_compile.cache.place import Place

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
        self.layers: dict[int, tuple[KvSize, dict[tuple[str, ...], Buffers]]] = {}  # by the kinds of state
        self._places: dict[tuple[torch.device, torch.dtype], Place] = {}

    def place(self, device: torch.device, dtype: torch.dtype) -> Place:
        """Where steps on these buffers write; `dtype`: of the mask."""
        if (device, dtype) not in self._places:
            self._places[device, dtype] = Place(self.batch, self.capacity, device, dtype)
        return self._places[device, dtype]

    def buffers(self, layer: int, size: KvSize, states: KvStates) -> Buffers:
        """The layer's buffers, made at its first use and for another size. Those of other kinds of state have the same rows."""
        names = tuple(kind.name for kind in states.kinds)
        held, by_kinds = self.layers.get(layer, (None, {}))
        if held != size:
            by_kinds = {}
            self.layers[layer] = size, by_kinds
        if names not in by_kinds:
            with torch.inference_mode(False):  # a tensor of inference mode has no version counter
                rows = [each[:2] for each in by_kinds.values()][:1] or [_rows(size)]
                by_kinds[names] = Buffers(*rows[0], states.allocate(size))
        return by_kinds[names]

    def drop_seen(self) -> None:
        """Forget buffers that someone still looks at: a view of keys may outlive its cache, and must keep its values."""
        self.layers = {
            n: held for n, held in self.layers.items() if not any(_is_seen(t) for b in held[1].values() for t in b[:2])
        }


def _rows(size: KvSize) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (size.batch, size.kv_heads, size.capacity)
    keys = torch.empty((*shape, size.head_dim), dtype=size.dtype, device=size.device)
    return keys, torch.empty((*shape, size.v_head_dim), dtype=size.v_dtype, device=size.device)


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
