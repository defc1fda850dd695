"""What lives between two calls of one attention layer, beside its keys and values. A leaf: imports torch alone.

A *kind* of state is a `KvState`: it names its tensors, gives their shapes and says how they follow new rows. A layer of the
cache holds one `KvStates` (layer_states.py): the tensors of all its kinds, and the version of the buffers they belong to.

*Derived* state (sums of a page, projected keys) follows from keys and mask alone: it is rebuilt when someone else wrote into
the buffers. *Remembered* state (a selection that an earlier call made) cannot be rebuilt: it is dropped then, and whoever
asks for it gets None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

PAGE = 16
"""Rows of a page: page `p` is rows `[16 p, 16 p + 16)` of the buffer."""

Tensors = Mapping[str, torch.Tensor]


class KvSize(NamedTuple):
    """The sizes of one layer's buffers: keys `[batch, kv_heads, capacity, head_dim]`, values with `v_head_dim`, `v_dtype`."""

    batch: int
    kv_heads: int
    capacity: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    v_dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> KvSize:
        """The sizes of buffers for rows like these."""
        batch, heads, _, head_dim = keys.shape
        return cls(batch, heads, capacity, head_dim, values.shape[-1], keys.dtype, values.dtype, keys.device)

    @property
    def pages(self) -> int:
        return -(-self.capacity // PAGE)


class Field(NamedTuple):
    """One tensor of a state.

    Args:
        name: its name within the state.
        shape: its sizes, the batch first.
        dtype: its dtype.
        rows: cache rows that one entry of dim 2 stands for (1, or `PAGE`); 0: no dim of it follows the rows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int = 0


class KvState:
    """One kind of state; subclasses are frozen descriptions without tensors. This base is the identity: nothing is kept.

    Attributes:
        name: under which a layer finds its tensors; unique within a layer.
        remembered: cannot be rebuilt from keys and values.
    """

    name: str = "identity"
    remembered: bool = False

    def fields(self, size: KvSize) -> tuple[Field, ...]:
        """The tensors for buffers of this size."""
        return ()

    def of(self, index: nn.Module | None) -> KvState | None:
        """The kind for a layer whose attention has this learned index, or none; None: nothing is kept there."""
        return self

    def begin(self, tensors: Tensors) -> None:
        """The next rows are the first ones: what the tensors hold is of another request."""

    def append(
        self,
        tensors: Tensors,
        keys: torch.Tensor,
        values: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        key_mask: torch.Tensor | None,
        new: int,
    ) -> None:
        """Make the entries right for rows `[0, end)`, given that they are for `[0, begin)`. Derived state only.

        An entry of a page is defined from the moment its page is full. Reads no row of `keys` from `end` on, as rows there
        hold anything; does not wait for the device.

        Args:
            tensors: written in place, by the name of the field.
            keys: the layer's whole buffer, `[B, Hk, capacity, D]`.
            values: `[B, Hk, capacity, Dv]`.
            begin: int32 `[B]`, rows that were there before.
            end: int32 `[B]`, rows that are there now.
            key_mask: bool `[B, >= end]`, false: padding, of weight 0; None: no padding.
            new: what `end - begin` is at most, known without asking the device.
        """


class PlacedState(KvState):
    """A derived state that depends on the position of each row, by which its key was rotated."""

    def append(
        self,
        tensors: Tensors,
        keys: torch.Tensor,
        values: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        key_mask: torch.Tensor | None,
        new: int,
        positions: torch.Tensor | None = None,
    ) -> None:
        """As `KvState.append`; `positions`: int `[B or 1, new]`, of the rows from `begin` on; None: nobody has said."""
        raise NotImplementedError
