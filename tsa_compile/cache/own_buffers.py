"""What policies keep beside the static caches of models' own: found again at each call by the buffers that it belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from tsa_compile.cache.kv_state import KvSize, KvState
from tsa_compile.cache.layer_states import KvStates


class OwnBuffers:
    """The states of buffers that a model writes itself. They go with the buffers."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def states(self, keys: torch.Tensor, kinds: tuple[KvState, ...], size: KvSize) -> KvStates:
        """The states of the cache whose keys are `keys` `[B, Hk, capacity, D]`; new ones are stale."""
        of_buffer = self._known.setdefault(keys, {})
        key = (tuple(kind.name for kind in kinds), size)
        if key not in of_buffer:
            of_buffer[key] = made = KvStates(kinds)
            with torch.inference_mode(False):
                made.tensors = made.allocate(size)
            made.mark_stale()
        found: KvStates = of_buffer[key]
        return found
