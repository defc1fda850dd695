"""What `Cache` of transformers calls on a layer, by rows in place. Knows no class of transformers: hf_layers.py joins them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch

from tsa_compile.cache.buffered import Buffered, Pair, joined
from tsa_compile.cache.layer_states import KvStates
from tsa_compile.cache.pinned import PinnableRows
from tsa_compile.cache.sliding import SlidingRows


class LayerMethods(Buffered):
    """What layers of both kinds have.

    Attributes (transformers reads and sets the last three):
        plain: the class of transformers that it stands for.
        is_initialized, device, dtype: of the rows.
    """

    is_compileable = False  # or `generate()` compiles the step itself and makes a 4-D mask outside of the model
    plain: ClassVar[Any]
    is_initialized: bool
    device: torch.device
    dtype: torch.dtype

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        self.is_initialized = True
        if not torch.compiler.is_dynamo_compiling():
            self.reserve(key_states, value_states, 0)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Append new rows `[B, Hk, n, D]`; returns the rows that their queries see.

        In a traced graph the rows only wait: the buffers take them at the next call that is not traced.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.compiler.is_dynamo_compiling():
            return self.update_traced(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("rows that require gradients cannot be written in place: call the model under torch.no_grad()")
        return self.append(key_states, value_states)

    def update_traced(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        raise NotImplementedError

    def get_seq_length(self) -> Any:
        raise NotImplementedError

    def reset(self) -> None:
        self.clear()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.get_seq_length():
            self.select_batch(beam_idx)

    def has_rows(self) -> bool:
        """Is there a batch? Also where a crop has left none of its rows."""
        return self.is_initialized and self.keys is not None

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length():
            keys = self.settled().keys
            self.select_batch(torch.arange(keys.shape[0], device=keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length():
            keys = self.settled().keys
            self.select_batch(torch.arange(keys.shape[0], device=keys.device)[indices])  # also a mask, or a slice

    def as_plain(self) -> Any:
        """A layer of transformers with these rows."""
        return self._with_rows(self.plain())

    def _with_rows(self, layer: Any) -> Any:
        if self.has_rows():
            layer.lazy_initialization(*self.views())
            layer.keys, layer.values = (rows.clone() for rows in self.views())
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Rows in a storage of their own; remembered state stays behind."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.lease, copied.states = copy.deepcopy(self.lease, memo), KvStates(self.states.kinds)
        copied.buffers = copied.storage = copied._late = None
        copied.first, copied.length, copied._assigned = 0, 0, {}
        if self.has_rows():
            copied._place(*self.views())
        return copied

    def __reduce__(self) -> Any:
        """Pickled as the layer of transformers: a storage is of one process."""
        return _itself, (self.as_plain(),)


class FullMethods(LayerMethods, PinnableRows):
    """A layer that keeps all rows."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        if self.pinned is not None:
            return self.append_pinned(key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.pinned = self._cleared = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)
        copied.pinned = copied._cleared = None
        return copied

    def update_traced(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        if self.lengths is not None:
            raise ValueError("batch rows of different lengths are appended outside of compiled graphs")
        self._late = (keys, values) if self._late is None else joined(self._late, (keys, values))
        return self.views()

    def get_seq_length(self) -> Any:
        """Rows so far, an int; of a pinned layer a tensor, as static layers of transformers have it."""
        return self.count() if self.pinned is None else self.pinned.offset

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that an attention sees, position of the first)."""
        if self.pinned is not None:
            assert self.buffers is not None
            return self.buffers.keys.shape[2], 0
        return self.count() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: {tokens_to_remove}; allowed: minus the number of tokens to remove, or 0")
        self.remove_last(-tokens_to_remove)


class SlidingMethods(LayerMethods, SlidingRows):
    """A layer that keeps the rows of its window."""

    def get_seq_length(self) -> Any:
        return self.cumulative_length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def as_plain(self) -> Any:
        layer = self._with_rows(self.plain(sliding_window=self.sliding_window))
        layer.cumulative_length, layer.record_past = self.cumulative_length, self.record_past
        return layer

    def update_traced(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """As transformers does it, on tensors of the graph: the rows of the window are small."""
        full = (keys, values) if not self.count() else joined(self.views(), (keys, values))
        seen = min(self.count(), self.sliding_window - 1) + keys.shape[-2]
        self.cumulative_length += keys.shape[-2]
        kept = full if self.record_past else tuple(t[:, :, max(0, t.shape[2] - self.sliding_window + 1) :] for t in full)
        self._assigned = {"keys": kept[0], "values": kept[1]}
        return full[0][:, :, full[0].shape[2] - seen :], full[1][:, :, full[1].shape[2] - seen :]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: {tokens_to_remove}; allowed: minus the number of tokens to remove, or 0")
        full = self.cumulative_length >= self.sliding_window
        if full and not self.record_past:
            raise RuntimeError(
                "crop: the window is full and older rows are gone; call `activate_past_recording` on the cache before"
            )
        self.remove_last(-tokens_to_remove)
        if full:
            self.keep_last(self.sliding_window - 1)
        # Below the window all rows are there; if recording began too late, those that are: as in transformers.
        self.cumulative_length = self.cumulative_length + tokens_to_remove if full else self.length


def _itself(layer: Any) -> Any:
    return layer
