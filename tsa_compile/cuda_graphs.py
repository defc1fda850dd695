"""A decode step that is recorded once and replayed: in a CUDA graph, which runs no Python and asks no guard.

What a replay cannot see is asked before each one: `ModelState`, the call's other arguments, and the buffers that it runs on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tsa_compile.cache.pinned import PinnableRows
from tsa_compile.cache.storage import Storage

MAX_KINDS = 24  # of calls that are recorded over one storage, such as numbers of rows; more are run as they are
_CACHE = object()  # stands for the cache in what is kept of a result
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Again:
    """The replay where there are no CUDA graphs: the call once more."""

    def __init__(self, call: Callable[[], Any], cache: Any) -> None:
        """Record `call`, which is not run; `cache` is the one that its result holds."""

    def __call__(self, call: Callable[[], Any], cache: Any) -> Any:
        """The result of `call`, which does what the recorded one did; its tensors are the caller's own."""
        return call()


class CudaReplay(Again):
    """The replay of a CUDA graph."""

    def __init__(self, call: Callable[[], Any], cache: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        own = torch.cuda.Stream()  # of the current device, which torch's own choice need not be
        with torch.cuda.graph(self.graph, stream=own, capture_error_mode="thread_local"):  # other threads may go on
            result = call()
        self._result = pytree.tree_map(lambda x: _CACHE if x is cache else x, result, is_leaf=lambda x: x is cache)

    def __call__(self, call: Callable[[], Any], cache: Any) -> Any:
        self.graph.replay()
        return pytree.tree_map(lambda x: cache if x is _CACHE else x.clone() if isinstance(x, torch.Tensor) else x, self._result)


@dataclasses.dataclass
class Recording:
    """One kind of step over one storage.

    Args:
        inputs: the call's tensors, at fixed addresses; each step copies its own into them.
        buffers: those of the layers; held so that none of them is mistaken for a later one.
        state: of the model, when the step ran.
        ready: did it run in one graph with every attention replaced? Then the next one is recorded.
        replay: once it is.
        refused: it could not be recorded.
    """

    inputs: dict[str, torch.Tensor]
    buffers: list[Any]
    state: tuple[Any, ...]
    ready: bool = False
    replay: Again | None = None
    refused: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def fill(self, kwargs: Mapping[str, Any]) -> None:
        """Copy a step's tensors into the fixed ones."""
        for name, tensor in self.inputs.items():
            tensor.copy_(kwargs[name])

    def record(self, call: Callable[[], Any], cache: Any) -> None:
        """Make `replay` of `call`, whose result holds `cache`.

        Raises:
            RuntimeError: the call does what a CUDA graph cannot hold; it was not run.
        """
        device = self.buffers[0].keys.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.replay = (CudaReplay if device.type == "cuda" else Again)(call, cache)


class Recordings:
    """All recordings of one session, by the storage that they run on; gone with it."""

    def __init__(self) -> None:
        self._kinds: weakref.WeakKeyDictionary[Storage, dict[Any, Recording]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def find(
        self,
        layers: Sequence[PinnableRows],
        kwargs: Mapping[str, Any],
        cache: Any,
        running: tuple[Any, bool],
        state: tuple[Any, ...],
        kind: Hashable = None,
    ) -> Recording | None:
        """The recording for this kind of call, a new one, or None: such a call is not recorded.

        Args:
            layers: of the cache.
            kwargs: the call's arguments; tensors may have other values the next time, all else counts as fixed.
            cache: among them.
            running: the plan of the call, held, as plans are told by identity; and whether it is a draft.
            state: of the model.
            kind: what is done with the arguments; None: the model is called.
        """
        storage = layers[0].storage
        assert storage is not None
        tensors = {n: x for n, x in kwargs.items() if isinstance(x, torch.Tensor)}
        others = {n: x for n, x in kwargs.items() if n not in tensors and x is not cache}
        if not all(isinstance(x, _CONSTANTS) for x in others.values()):
            return None
        shapes = tuple((n, x.shape, x.dtype, x.device) for n, x in tensors.items())
        key = (shapes, tuple(others.items()), Same(running[0]), running[1], kind)
        buffers = [layer.buffers for layer in layers]
        with self._lock:
            kinds = self._kinds.setdefault(storage, {})
            found = kinds.get(key)
            if found is not None and found.state == state and all(a is b for a, b in zip(found.buffers, buffers, strict=True)):
                return found
            if found is None and len(kinds) >= MAX_KINDS:
                return None
            with torch.inference_mode(False):
                inputs = {n: torch.empty_like(x) for n, x in tensors.items()}
            kinds[key] = Recording(inputs, buffers, state)
            return kinds[key]

    def of(self, storage: Storage) -> list[Recording]:
        """Those over one storage, the oldest first."""
        with self._lock:
            return list(self._kinds.get(storage, {}).values())

    def clear(self) -> None:
        with self._lock:
            self._kinds.clear()


class Same:
    """A key that is equal for one object alone, and keeps it alive."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._held is other._held

    def __hash__(self) -> int:
        return id(self._held)
