"""Exact: every key is read, by a kernel made for a few query rows over a long cache.

The keys are split among programs until one row of a batch fills the GPU, and the query heads of a KV head read its keys together
(flash-decoding with packed groups). What dense attention computes, to the dtype's error.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.decode_checks import MAX_ROWS
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, own_edges


@dataclasses.dataclass(frozen=True)
class Exact(Policy):
    """Attention of 1 to 16 query rows to every key that they see, whatever the mask."""

    masks: ClassVar[frozenset[str]] = frozenset({"causal", "sliding window", "bidirectional", "data"})
    phases: ClassVar[frozenset[str]] = frozenset({"decode", "verify"})
    computes: ClassVar[frozenset[str]] = frozenset({"softcap", "sinks"})

    def refuse(self, site: AttentionSite) -> str | None:
        return too_many_rows(site)

    def guaranteed(self, site: AttentionSite) -> Edges:
        return own_edges(site)

    def kernel_lengths(self) -> tuple[int, ...]:
        return (128,)  # a tile of keys; longer ones may be read in parts, and merged

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        x, window = site.operands, site.mask.window or 0
        return emit(
            torch.ops.tsa.decode_attention.default,
            x.q, x.k, x.v, *where(emit, site), x.key_mask, site.scale, x.mask, x.sinks, site.softcap, window, site.mask.causal,
        )[0]  # fmt: skip


def where(emit: Emit, site: AttentionSite) -> tuple[Any, int, Any, Any]:
    """`blocks`, `block`, `start` and `lengths`, as decode operators take them, which read `operands.key_mask` besides.

    A view that was made from the mask (`tsa::key_view`) says the same as the mask again, by rank: it is left out. One query row
    reads from its first key to its last, and not the rest of a fixed buffer.
    """
    x = site.operands
    if x.view.ranks is None:
        return x.view.blocks, x.view.block, x.view.start, x.view.lengths
    if site.q_len != 1 or site.mask.window is not None:  # further rows and windows are told from the buffer's end
        return None, 1, None, None
    return None, 1, *emit(torch.ops.tsa.padding_range.default, x.key_mask)


def too_many_rows(site: AttentionSite) -> str | None:
    """Why the decode kernels do not take the site's query rows; None: they do."""
    rows = site.q_len
    if not isinstance(rows, int):
        return f"query rows {rows} vary between runs: decode takes a fixed number, up to {MAX_ROWS}"
    return f"{rows} query rows: decode takes up to {MAX_ROWS}" if rows > MAX_ROWS else None
