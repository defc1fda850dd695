"""The buffers behind the rows of one attention layer: views of them, what waits to be put there, how they grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tsa_compile.cache.kv_state import KvSize, KvState
from tsa_compile.cache.layer_states import KvStates
from tsa_compile.cache.lease import Lease
from tsa_compile.cache.storage import Buffers, Pool, Storage

Pair = tuple[torch.Tensor, torch.Tensor]


class Buffered:
    """Keys `[B, Hk, length, D]` and values: views with fixed strides of buffers that grow by chunks.

    Two things may wait to be put into the buffers: rows of a traced graph (`_late`), which must hold no allocation of ours,
    and tensors that someone assigned to `keys` or `values` (`_assigned`). Every method puts them there first.

    Args:
        lease: the cache's storages; None: its own, of a pool of its own.
        states: kinds of state that follow the rows.
    """

    def __init__(self, lease: Lease | None = None, states: tuple[KvState, ...] = (), **kwargs: Any) -> None:
        self.lease = Lease(Pool()) if lease is None else lease
        self.number = self.lease.enter()
        self.states = KvStates(states)
        self._kept = states
        self.first = 0  # the view starts at this row of the buffers; not 0 in sliding layers alone
        self.length = 0  # rows in the buffers; where batch rows differ, of the longest
        self.lengths: torch.Tensor | None = None  # int32 [B], where batch rows differ
        self.key_mask: torch.Tensor | None = None  # bool [B, rows], false: padding, of weight 0 in states
        self.buffers: Buffers | None = None
        self.storage: Storage | None = None
        self._late: Pair | None = None
        self._assigned: dict[str, torch.Tensor] = {}
        super().__init__(**kwargs)

    @property
    def keeping(self) -> Any:
        """How rows are kept beside the buffers (`Policy.keeping`); None: the buffers hold all."""
        return None

    @property
    def keys(self) -> torch.Tensor | None:
        return self._rows("keys")

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._assign("keys", tensor)

    @property
    def values(self) -> torch.Tensor | None:
        return self._rows("values")

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._assign("values", tensor)

    def views(self) -> Pair:
        """Keys and values of a layer that has rows, or had some."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys, values

    def count(self) -> int:
        """Rows of the view, with those that wait."""
        if "keys" in self._assigned:
            return self._assigned["keys"].shape[-2]
        return self.length + (0 if self._late is None else self._late[0].shape[-2])

    def keep(self, kinds: tuple[KvState, ...]) -> None:
        """Let these kinds of state follow the rows too. A kind that is new to rows that are there is made at the next step.

        With rows, the buffers are others afterwards.
        """
        if kinds is self._kept:  # asked at every call
            return
        held, self._kept = self.states.kinds, kinds
        new = tuple(kind for kind in kinds if kind.name not in {h.name for h in held})
        if not new:
            return
        self.settle()
        old, self.states = self.buffers, KvStates((*held, *new))
        if old is None:
            return
        assert self.storage is not None
        size = KvSize.of(old.keys, old.values, old.keys.shape[2])
        self.buffers = self.storage.buffers(self.number, size, self.states)
        self.states.tensors = self.buffers.states
        for to, rows in zip(self.buffers[:2], old[:2], strict=True):
            to.copy_(rows)
        self.states.mark_stale()

    def clear(self) -> None:
        """No rows; the buffers stay."""
        self.first = self.length = 0
        self.lengths = self.key_mask = self._late = None
        self._assigned = {}
        self.states.forget()

    def release(self) -> None:
        """No rows, and the buffers given back."""
        self.clear()
        if self.storage is not None:
            self.lease.leave(self.number, self.storage)
        self.storage = self.buffers = None

    def settle(self) -> None:
        """Put what waits into the buffers."""
        if self._assigned:
            keys, values = self.keys, self.values
            if keys is None or values is None or keys.shape[:3] != values.shape[:3]:
                raise ValueError("keys and values of a cache layer must be assigned together, with the same rows")
            self.lengths, self._late, self._assigned = None, None, {}
            self.states.forget()
            self._place(keys, values)
        if self._late is not None:
            late, self._late = self._late, None
            self._store(*late)

    def gather_late(self, whole: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """What waits of a traced graph is a part of the new rows; all of them, `whole` of it, go into the buffers."""
        if self._late is not None:
            self._late = whole(self._late[0]), whole(self._late[1])
        self.settle()

    def drop_late(self) -> None:
        """What waits of a traced graph is forgotten."""
        self._late = None

    def settled(self) -> Buffers:
        """The buffers with everything in them."""
        self.settle()
        if self.buffers is None:
            raise ValueError("the cache layer is empty: nothing was appended yet")
        return self.buffers

    def append(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor | None = None) -> Pair:
        raise NotImplementedError

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As `append`, for rows that were seen already."""
        self.append(keys, values)

    def select_batch(self, index: torch.Tensor) -> None:
        raise NotImplementedError

    def reserve(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> Buffers:
        """Buffers for `rows` rows like `keys` and `values`, with the present rows in them: the same ones, or larger."""
        old, left = self.buffers, self.storage
        if old is not None and self.length and old.keys.shape[0] != keys.shape[0]:
            raise ValueError(f"keys: batch {keys.shape[0]}, but the cache holds rows of batch {old.keys.shape[0]}")
        stale, first = self._is_stale(), self.first
        storage = self.lease.fit(self.number, keys.shape[0], rows)
        buffers = self._enter(storage, keys, values, rows)
        if buffers is not old:
            self.states.mark_stale()
            if old is not None and self.length:
                for new, past in zip(buffers[:2], old[:2], strict=True):
                    new[:, :, : self.length] = past[:, :, first : first + self.length]
                self.first = 0
                if not stale:
                    self.states.copy_from(old.states)
                    self.states.settle(buffers.keys, buffers.values)
        self._leave(left)
        return buffers

    def _enter(self, storage: Storage, keys: torch.Tensor, values: torch.Tensor, rows: int) -> Buffers:
        """The layer's buffers in `storage`; the present ones, if they are of it and hold `rows` rows of this kind."""
        old = self.buffers
        wanted = KvSize.of(keys, values, self._capacity(storage, rows))
        if old is not None and self.length:  # rows of two dtypes: as concatenation has it
            types = [torch.promote_types(a.dtype, b.dtype) for a, b in ((keys, old.keys), (values, old.values))]
            wanted = wanted._replace(dtype=types[0], v_dtype=types[1])
        if old is None or storage is not self.storage or KvSize.of(old.keys, old.values, old.keys.shape[2]) != wanted:
            self.buffers = storage.buffers(self.number, wanted, self.states)
            self.states.tensors = self.buffers.states
        self.storage = storage
        assert self.buffers is not None
        return self.buffers

    def _leave(self, left: Storage | None) -> None:
        if left is not None and left is not self.storage:
            self.lease.leave(self.number, left)

    def _capacity(self, storage: Storage, rows: int) -> int:
        return storage.capacity

    def _place(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The rows become these; states are stale afterwards."""
        left = self.storage
        if self.buffers is not None:  # tensors that lie in the buffers themselves
            keys, values = (t.clone() if shares(t, b) else t for t, b in zip((keys, values), self.buffers[:2], strict=True))
        self.first = self.length = 0
        buffers = self._enter(self.lease.fit(self.number, keys.shape[0], keys.shape[2]), keys, values, keys.shape[2])
        self._leave(left)
        self.length = keys.shape[2]
        buffers.keys[:, :, : self.length], buffers.values[:, :, : self.length] = keys, values
        self.states.mark_stale()

    def _is_stale(self) -> bool:
        return bool(self.states.kinds and self.length) and self.buffers is not None and self.states.is_stale(*self.buffers[:2])

    def _rows(self, which: str) -> torch.Tensor | None:
        if which in self._assigned:
            return self._assigned[which]
        late = None if self._late is None else self._late[0 if which == "keys" else 1]
        if self.buffers is None:
            return late
        rows = getattr(self.buffers, which)[:, :, self.first : self.first + self.length]
        return rows if late is None else torch.cat([rows, late], -2)

    def _assign(self, which: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            self._assigned[which] = tensor
        elif self.count():
            self.clear()


def joined(past: Pair, new: Pair) -> Pair:
    """Rows `[B, Hk, n, D]` of both, one behind the other."""
    return torch.cat([past[0], new[0]], -2), torch.cat([past[1], new[1]], -2)


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do two tensors lie in the same memory?"""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
