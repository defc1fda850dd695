"""The states of one layer of the cache: their tensors, and the version of the key and value buffers that they belong to."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tsa_compile.cache.kv_state import PAGE, KvSize, KvState, PlacedState, Tensors


class KvStates:
    """The states of one layer: which kinds, their tensors, and the version of the buffers that they belong to.

    Args:
        kinds: what is kept; names must differ.
    """

    def __init__(self, kinds: tuple[KvState, ...] = ()) -> None:
        names = [kind.name for kind in kinds]
        if len(set(names)) != len(names):
            raise ValueError(f"kinds: two states of one layer have the same name: {names}")
        self.kinds = kinds
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.rebuilt = 0  # times that derived state was found stale
        self.dropped = 0  # times that remembered state was
        self._made_at: dict[str, int] = {}  # remembered state: the rows that were there when it was made
        self._versions: tuple[int, int] | None = None
        self.placed = any(isinstance(kind, PlacedState) for kind in kinds)  # do any ask for positions?

    def allocate(self, size: KvSize) -> dict[str, dict[str, torch.Tensor]]:
        """New tensors for buffers of this size, by the state's and the field's name."""
        made: dict[str, dict[str, torch.Tensor]] = {}
        for kind in self.kinds:
            fields = kind.fields(size)
            made[kind.name] = {f.name: torch.zeros(f.shape, dtype=f.dtype, device=size.device) for f in fields}
        return made

    def is_stale(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Did anyone but the layer write into its buffers since `settle`?"""
        return self._versions is not None and self._versions != (keys._version, values._version)

    def mark_stale(self) -> None:
        """The buffers hold other rows than the states."""
        self._versions = (-1, -1)

    def copy_from(self, old: Mapping[str, Tensors]) -> None:
        """Take the entries of tensors that belong to buffers of another capacity with the same rows."""
        for name, fields in old.items():
            for field, tensor in fields.items():
                own = self.tensors[name][field]
                common = tuple(slice(0, min(n, m)) for n, m in zip(own.shape, tensor.shape, strict=True))
                own[common].copy_(tensor[common])

    def settle(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The states belong to the buffers as they are now."""
        self._versions = (keys._version, values._version)

    def begin(self) -> None:
        """The next rows are the first ones."""
        for kind in self.kinds:
            kind.begin(self.tensors[kind.name])

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        key_mask: torch.Tensor | None,
        new: int,
        positions: torch.Tensor | None = None,
    ) -> None:
        """All derived kinds follow rows `[begin, end)`; see `KvState.append`, `PlacedState.append`. Mask and positions
        may be on another device."""
        key_mask, positions = (None if x is None else x.to(keys.device) for x in (key_mask, positions))
        for kind in self.kinds:
            if isinstance(kind, PlacedState):
                kind.append(self.tensors[kind.name], keys, values, begin, end, key_mask, new, positions)
            elif not kind.remembered:
                kind.append(self.tensors[kind.name], keys, values, begin, end, key_mask, new)

    def remember(self, name: str, rows: int) -> None:
        """The policy has filled the tensors of the remembered kind `name`, over `rows` rows."""
        if not any(kind.remembered and kind.name == name for kind in self.kinds):
            raise ValueError(f"name: {name!r} is no remembered state of this layer: {[k.name for k in self.kinds]}")
        self._made_at[name] = rows

    def recall(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a kind; None where a remembered one is not there or was dropped."""
        kind = next(kind for kind in self.kinds if kind.name == name)
        return None if kind.remembered and name not in self._made_at else self.tensors[name]

    def forget(self) -> None:
        """Drop what was remembered: the buffers hold other rows now."""
        self.dropped += len(self._made_at)
        self._made_at.clear()

    def crop(self, rows: int) -> None:
        """`rows` rows are left. Entries of dropped pages are undefined until their page is full again.

        A remembered state survives the roll-back of a verify step (up to a page of rows), not a return to an older prompt.
        """
        kept = {name: made for name, made in self._made_at.items() if rows >= made - PAGE}
        self.dropped += len(self._made_at) - len(kept)
        self._made_at = kept
