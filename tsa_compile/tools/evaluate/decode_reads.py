"""What each operator of a decode step reads of the cache, by what it was given: one rule an operator, in bytes.

Keys, values, and "index": all that is kept beside them. A row counts once for each KV head that reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.attend.decode.reference import listed_pages
from tsa_compile.kernels.attend.sampled.reference import value_weights
from tsa_compile.kernels.attend.sampled.teams import key_biases
from tsa_compile.kernels.common.pages import PAGE, page_view
from tsa_compile.kernels.common.teams import unpack
from tsa_compile.kernels.common.view import key_range, row_range, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
Given = Mapping[str, Any]  # an operator's arguments by name
Read = dict[str, int]  # bytes by what they are: "keys", "values", "index"


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


def _teams(given: Given) -> Read:
    """Keys of representatives, then keys and values of the teams that any query head of a KV head draws, and of recent pages."""
    cache = [given[name] for name in ("q", "k", "v", "blocks", "block", "start", "lengths", "key_mask", "scale")]
    logits = torch.ops.tsa.decode_attention(*cache, scores=True)[2][:, :, 0]
    k, (first, end) = given["k"], key_range(given["k"], _view(given))
    bits, group = rows_in_order(given["teams"][..., None], page_view(_view(given)))[..., 0], logits.shape[1] // k.shape[1]
    drawn = range(0, max(0, int((end.max() - 1) // PAGE) - given["recent"] + 1))
    biases = key_biases(logits, bits.repeat_interleave(group, 1), first, end, given["seed"], given["draws"], given["recent"])
    rows = int((biases > -torch.inf).unflatten(1, (k.shape[1], -1)).any(2).sum())
    before = torch.arange(len(drawn), device=k.device) <= ((end - 1) // PAGE - given["recent"])[:, None]  # [B, pages]
    scored = int((unpack(bits[:, :, : len(drawn)])[2] * before[:, None]).sum())
    index = {"index": int(before.sum()) * k.shape[1] * bits.element_size()}
    return Counter(_of_rows(given, rows + scored, rows)) | index


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


def _projected(given: Given) -> Read:
    """Projected keys of whole pages, of the heads that look things up."""
    index = given["index"]
    view = KvView(None, 1, given["start"], given["lengths"])
    first, end = row_range(index.shape[2], index.shape[0], view, index.device)
    return {"index": int((end // PAGE * PAGE - first).clamp(min=0).sum()) * index.shape[1] * _row_bytes(index)}


def _newly_projected(given: Given) -> Read:
    """The new rows' keys."""
    return {"index": int((given["end"] - given["begin"]).sum()) * len(given["heads"]) * _row_bytes(given["k"])}


def _refined(given: Given) -> Read:
    """Directions, coordinates and scales of the listed pages."""
    parts = [given[name] for name in ("basis", "coords", "scales")]
    whole, listed = _whole_and_listed(given, parts[0].shape[1])
    return {"index": int((whole & listed).sum()) * sum(x[0, 0, 0].nbytes for x in parts)}


def _completed(given: Given) -> Read:
    """Mean values of the pages that are in no list."""
    sums = given["sums"]
    whole, listed = _whole_and_listed(given, sums.shape[1])
    return {"index": int((whole & ~listed).sum()) * _row_bytes(sums)}


def _whole_and_listed(given: Given, kv_heads: int) -> tuple[Tensor, Tensor]:
    """bool `[B, Hk, P]`: pages that are full and hold a key; those in a list, all without lists."""
    first, end = row_range(given["capacity"], given["logits"].shape[0], _view(given), given["logits"].device)
    page = torch.arange(given["logits"].shape[3], device=end.device)
    whole = ((page >= first[:, None] // PAGE) & (page < end[:, None] // PAGE))[:, None].expand(-1, kv_heads, -1)
    if given["indices"] is None:
        return whole, torch.ones_like(whole)
    return whole, listed_pages(given["indices"], given["list_counts"], len(page))


def _appended(given: Given) -> Read:
    """The keys of pages that became whole."""
    pages = int((given["end"] // PAGE - given["begin"] // PAGE).sum())
    return {"index": pages * PAGE * given["k"].shape[1] * _row_bytes(given["k"])}


RULES: Mapping[str, Callable[[Given], Read]] = {
    "decode_attention": _every_key,
    "page_attention": _listed,
    "sampled_value_attention": _sampled,
    "team_attention": _teams,
    "page_scores": _index,
    "page_teams": _index_made,
    "append_teams": _appended,
    "page_sums": _index_made,
    "append_pages": _appended,
    "projected_scores": _projected,
    "append_projected": _newly_projected,
    "refine_scores": _refined,
    "page_basis": _index_made,
    "append_basis": _appended,
    "complete_pages": _completed,
}
READ_NO_CACHE = ("select_pages", "join_pages", "attach_state", "attach_rows", "padding_range", "key_view")
