"""Bytes of the cache that decode steps read, counted from what their operators were given: keys, values, and the index.

Weights, logits and other scratch are not counted, nor what steps write. A row counts once for each KV head that reads it; of
half a page or less beyond a row's end nothing counts. What a CUDA graph replays is not seen: count steps that run as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.attend.decode.reference import listed_pages
from tsa_compile.kernels.attend.sampled.reference import value_weights
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.view import key_range, row_range
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
Given = Mapping[str, Any]  # an operator's arguments by name
Read = dict[str, int]  # bytes by what they are: "keys", "values", "index"


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
            if name not in _RULES and name not in _READ_NO_CACHE:
                raise ValueError(f"no rule says what tsa::{name} reads of the cache")
            self.read.update(_RULES[name](_named(func._schema, args, kwargs or {})) if name in _RULES else {})
            self.attentions += name.endswith("_attention")
        return result


def _named(schema: Any, args: Any, kwargs: Mapping[str, Any]) -> Given:
    names = [a.name for a in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def _view(given: Given) -> KvView:
    return KvView(given["blocks"], given["block"], given["start"], given["lengths"])


def _row_bytes(x: Tensor) -> int:
    """Of one position and head of keys or values `[N, Hk, L, D]`."""
    return x.shape[3] * x.element_size()


def _of_rows(given: Given, keys: int, values: int) -> Read:
    """So many rows of keys and of values, each of one head."""
    return {"keys": keys * _row_bytes(given["k"]), "values": values * _row_bytes(given["v"])}


def _every_key(given: Given) -> Read:
    first, end = key_range(given["k"], _view(given))
    rows = (end - first).clamp(min=0)
    if given["window"]:
        rows = rows.clamp(max=given["window"] + given["q"].shape[2] - 1)
    count = int(rows.sum()) * given["k"].shape[1]
    return _of_rows(given, count, count)


def _listed(given: Given) -> Read:
    """Rows of the listed pages between a row's first key and its last."""
    first, end = (x[:, None] for x in key_range(given["k"], _view(given)))
    page = torch.arange(-(-int(end.max()) // PAGE), device=end.device) * PAGE
    inside = (torch.minimum(page + PAGE, end) - torch.maximum(page, first)).clamp(min=0)  # [B, pages]
    count = int((listed_pages(given["indices"], given["counts"], len(page)) * inside[:, None]).sum())
    return _of_rows(given, count, count)


def _sampled(given: Given) -> Read:
    """All keys, and the values that any query head of a KV head draws."""
    every = _every_key({**given, "window": 0})
    k, first, end = given["k"], *key_range(given["k"], _view(given))
    cache = [given[name] for name in ("q", "k", "v", "blocks", "block", "start", "lengths", "key_mask", "scale", "mask")]
    logits = torch.ops.tsa.decode_attention(*cache, None, given["softcap"], scores=True)[2][:, :, 0]
    weights = value_weights(logits, first, end, given["seed"], given["samples"], given["form"])
    drawn = (weights > 0).unflatten(1, (k.shape[1], -1)).any(2).sum((1, 2))
    values = torch.where(end - first <= given["samples"], (end - first) * k.shape[1], drawn)
    return every | {"values": int(values.sum()) * _row_bytes(given["v"])}


def _index(given: Given) -> Read:
    """Sums of whole pages, and how many rows each has."""
    sums = given["sums"]
    first, end = row_range(given["capacity"], given["q"].shape[0], _view(given), sums.device)
    pages = int((end // PAGE - first // PAGE).clamp(min=0).sum())
    return {"index": pages * (sums.shape[1] * _row_bytes(sums) + given["counts"].element_size())}


def _index_made(given: Given) -> Read:
    """An index that nobody keeps is made from every key."""
    first, end = key_range(given["k"], _view(given))
    return {"index": int((end - first).clamp(min=0).sum()) * given["k"].shape[1] * _row_bytes(given["k"])}


def _appended(given: Given) -> Read:
    """The keys of pages that became whole."""
    pages = int((given["end"] // PAGE - given["begin"] // PAGE).sum())
    return {"index": pages * PAGE * given["k"].shape[1] * _row_bytes(given["k"])}


_RULES: Mapping[str, Callable[[Given], Read]] = {
    "decode_attention": _every_key,
    "page_attention": _listed,
    "sampled_value_attention": _sampled,
    "page_scores": _index,
    "page_sums": _index_made,
    "append_pages": _appended,
}
_READ_NO_CACHE = ("select_pages", "attach_state", "padding_range", "key_view")
