"""A rewritten graph over static caches of a model's own: it is given what its policies keep beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tsa_compile.cache.own_buffers import OwnBuffers
from tsa_compile.passes.context import KeptCache


class WithStates:
    """Takes the inputs of the graph as it was traced. What is kept is made anew where someone else wrote into a buffer.

    Args:
        run: the rewritten graph, compiled; it takes the states behind the other inputs.
        anew: the same, but that it makes the states anew.
        caches: its static caches.
        names: of the inputs of the graph as it was traced.
        buffers: has the states.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        anew: Callable[..., Any],
        caches: Sequence[KeptCache],
        names: Sequence[str],
        buffers: OwnBuffers,
    ) -> None:
        self._run, self._anew = run, anew
        self._places = [(names.index(c.keys), names.index(c.values), c) for c in caches]
        self._buffers = buffers

    def __call__(self, *args: Any) -> Any:
        kept = [(args[k], args[v], self._buffers.states(args[k], c.kinds, c.size), c) for k, v, c in self._places]
        counted = not any(keys.is_inference() or values.is_inference() for keys, values, _, _ in kept)
        fresh = counted and not any(states.is_stale(keys, values) for keys, values, states, _ in kept)
        tensors = [states.tensors[kind][field] for _, _, states, cache in kept for kind, field in cache.inputs]
        result = (self._run if fresh else self._anew)(*args, *tensors)
        for keys, values, states, _ in kept:
            states.rebuilt += not fresh
            if counted:
                states.settle(keys, values)
        return result
