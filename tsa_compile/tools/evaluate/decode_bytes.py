"""Bytes of the cache that decode steps read, counted from what their operators were given: keys, values, and the index.

Weights, logits and other scratch are not counted, nor what steps write. A row counts once for each KV head that reads it; of
half a page or less beyond a row's end nothing counts. What a CUDA graph replays is not seen: count steps that run as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.tools.evaluate.decode_reads import READ_NO_CACHE, RULES


class Traffic(TorchDispatchMode):
    """Inside, counts what operators of this project read. Waits for the device at each.

    Attributes:
        read: bytes by kind.
        attentions: calls of operators that attend.

    Raises:
        ValueError: an operator has no rule, so that the sum would be wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[str] = Counter()
        self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == "tsa":
            name = func._schema.name.removeprefix("tsa::")
            if name not in RULES and name not in READ_NO_CACHE:
                raise ValueError(f"no rule says what tsa::{name} reads of the cache")
            self.read.update(RULES[name](_named(func._schema, args, kwargs or {})) if name in RULES else {})
            self.attentions += name.endswith("_attention")
        return result


def _named(schema: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [a.name for a in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
