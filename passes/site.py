"""What a policy knows about one attention: its sizes, what its mask was proven to be, and what it reads. A leaf: no graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from tsa_compile.kernels.types import Operands

Size: TypeAlias = int | torch.SymInt

PHASES = ("prefill", "decode", "verify", "draft", "denoise_first", "denoise")
MASKS = ("causal", "sliding window", "bidirectional", "data")
VERIFY_ROWS = 16  # so many query rows after keys of their own past check tokens that were proposed: speculative decoding
NOT_EMITTED = Operands(None, None, None)  # in a graph, while policies are asked whether they take a site


@dataclasses.dataclass(frozen=True)
class MaskFacts:
    """What was proven about a mask: query `i` sees key `j` if and only if all of the facts allow it.

    Args:
        causal: only keys up to the query's own position, the queries being the last `Lq` of the `K` keys: `j <= i + K - Lq`.
        window: with `causal`, only the last `window` of these keys, the own position included.
        padded: some keys may be hidden from all queries and heads of a batch row alike: `Operands.key_mask` says which.
        unproven: nothing was proven, for this reason; a policy for masks of kind "data" may take `Operands.mask` for it.
    """

    causal: bool = False
    window: int | None = None
    padded: bool = False
    unproven: str | None = None

    @property
    def kind(self) -> str:
        """One of `MASKS`; a key mask may come with each but "data"."""
        if self.unproven is not None:
            return "data"
        if not self.causal:
            return "bidirectional"
        return "causal" if self.window is None else "sliding window"


class Route(NamedTuple):
    """Whose selection a site takes in place of its own.

    Args:
        name: how the plan calls the site that selects, the anchor.
        is_anchor: whether a site is it.
        heads: for each KV head of the site that takes it, the anchor's KV head whose list it reads; None: the same one.
    """

    name: str
    is_anchor: Callable[[AttentionSite], bool]
    heads: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention, `softmax(scale * q k^T + mask) v`, in a graph or of tensors at hand (`AttentionSite.of`).

    Args:
        module: path of the module that computes it, such as "model.layers.3.self_attn"; "" if unknown.
        index: its place among the sites of the graph.
        layer: the first number in `module`, or else `index`.
        phase: one of `PHASES`.
        form: how it was written: "sdpa", "manual" or "flex".
        batch, heads, kv_heads, q_len, head_dim, v_head_dim: sizes; a symbol where they vary between runs.
        k_len: keys that any query may see: the length of `operands.k`, or what the blocks of `operands.view` hold.
        dtype: of the output, and of the operands.
        device: of the operands.
        scale: factor of the scores.
        past: whether there are keys before the first query, as a cache has them; a causal mask puts the queries at the end.
        mask: what was proven about the mask.
        obstacle: why no policy may touch this site, such as a mask of which nothing was proven; or None.
        operands: graph nodes or tensors; `NOT_EMITTED` while policies are asked whether they take the site.
        softcap: the scores are `softcap * tanh(scale * q k^T / softcap)` before they are masked; 0: they are not capped.
        sinks: whether each head's softmax has a logit without a value, `operands.sinks`.
        dense_below: with fewer keys the policy's operators read them all, as it does not pay to choose (`Plan.where`); 0: always.
    """

    module: str
    index: int
    layer: int
    phase: str
    form: str
    batch: Size
    heads: Size
    kv_heads: Size
    q_len: Size
    k_len: Size
    head_dim: Size
    v_head_dim: Size
    dtype: torch.dtype
    device: torch.device
    scale: float
    past: bool
    mask: MaskFacts
    obstacle: str | None = None
    operands: Operands = NOT_EMITTED
    dense_below: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @classmethod
    def of(
        cls,
        operands: Operands,
        mask: MaskFacts,
        scale: float | None = None,
        *,
        phase: str | None = None,
        module: str = "",
        layer: int = 0,
        k_len: int | None = None,
        softcap: float = 0.0,
    ) -> AttentionSite:
        """The site of tensors at hand.

        Args:
            operands: the tensors.
            mask: what holds of the mask.
            scale: factor of the scores; None: 1 / sqrt(head dim).
            phase: as above; None: told by the number of query rows.
            module, layer: as above.
            softcap: as above.
            k_len: as above; None: all of `operands.k`, which must then hold a row of the batch each, and no pool of blocks.
        """
        q, k, v = operands.q, operands.k, operands.v
        batch, heads, q_len, head_dim = q.shape
        k_len = k.shape[2] if k_len is None else k_len
        return cls(
            module=module,
            index=layer,
            layer=layer,
            phase=phase or phase_of(q_len, past=k_len > q_len, causal=mask.causal),
            form="sdpa",
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            q_len=q_len,
            k_len=k_len,
            head_dim=head_dim,
            v_head_dim=v.shape[3],
            dtype=q.dtype,
            device=q.device,
            scale=head_dim**-0.5 if scale is None else scale,
            past=k_len > q_len,
            mask=mask,
            operands=operands,
            softcap=softcap,
            sinks=operands.sinks is not None,
        )


def phase_of(rows: Size, past: bool, causal: bool, drafting: bool = False) -> str:
    """The phase of an attention that nobody told: by its number of query rows. Rows that vary between runs are prefill's."""
    if isinstance(rows, int) and rows == 1:
        return "draft" if drafting else "decode"
    return "verify" if isinstance(rows, int) and rows <= VERIFY_ROWS and past and causal else "prefill"
