"""Cache layers of transformers that append in place, where its own copy the whole cache at every step.

`layer_types()` makes the classes when transformers is there. They stand for `DynamicLayer` and `DynamicSlidingWindowLayer`:
the same methods, and the same rows at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from tsa_compile.cache.layer_methods import FullMethods, SlidingMethods
from tsa_compile.cache.resident import ResidentSet
from tsa_compile.cache.resident_rows import ResidentMethods
from tsa_compile.cache.sharded import Shard, SpreadMethods
from tsa_compile.cache.shared_prefix import SharedMethods


class LayerTypes(NamedTuple):
    full: type[FullMethods]
    sliding: type[SlidingMethods]
    spread: type[SpreadMethods]
    resident: type[ResidentMethods]
    shared: type[SharedMethods]
    passing: type[Any]

    def that_keep(self, keeping: Any) -> Callable[..., Any]:
        """What makes the full layers of one cache; `keeping`: see `Policy.keeping`."""
        if keeping is None:
            return self.full
        if isinstance(keeping, Shard):
            return functools.partial(self.spread, keeping)
        return functools.partial(self.resident, ResidentSet(keeping))


@functools.cache
def layer_types() -> LayerTypes:
    """Our classes; imports transformers."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    class GrowingLayer(FullMethods, DynamicLayer):
        plain = DynamicLayer

    class GrowingSlidingLayer(SlidingMethods, DynamicSlidingWindowLayer):
        plain = DynamicSlidingWindowLayer

    class SpreadLayer(SpreadMethods, GrowingLayer):
        """Its rows are spread over a process group."""

    class ResidentLayer(ResidentMethods, GrowingLayer):
        """Its rows lie in host memory."""

    class SharedLayer(SharedMethods, GrowingLayer):
        """Its first rows are other requests' too."""

    class PassingLayer(DynamicLayer):
        """It keeps nothing: a call that has no cache."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return key_states, value_states

    return LayerTypes(GrowingLayer, GrowingSlidingLayer, SpreadLayer, ResidentLayer, SharedLayer, PassingLayer)
