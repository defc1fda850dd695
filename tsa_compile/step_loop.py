"""What several decode steps are that run, and are recorded, as one (`Steps.loop`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol


class StepLoop(Protocol):
    """Several steps of one token that run as one: `loop(call, advance, **kwargs)` calls the model once for each, and `advance`
    between two of them, which moves the cache's place. It does nothing that a CUDA graph cannot hold.

    Attributes:
        steps: how many.
        key: loops of one key do the same with the same arguments.
    """

    @property
    def steps(self) -> int: ...

    @property
    def key(self) -> Hashable: ...

    def __call__(self, call: Callable[..., Any], advance: Callable[[], None], **kwargs: Any) -> Any: ...
