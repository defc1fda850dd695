"""How much a selection keeps, as recorders are told it: an integer for each batch row, and of how much. Read by no kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tsa_compile.kernels.arguments import block_sparse_attention
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS
from tsa_compile.kernels.registry import resolve

Tensor = torch.Tensor


def keys(result: tuple[Tensor, ...], arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Of lists of keys: their counts `[B]`, the second result, of the keys, the second argument."""
    return result[1], arguments[1].shape[2]


def key_blocks(bits: Tensor, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Of a bitmap `[B, H or Hk, row blocks, words]`: key blocks that row blocks read, `[B]`, over all heads, of those that
    begin before a row block's end; padding counts among the latter alone."""
    q_len, k_len = arguments[0].shape[2], named.get("k_len") or arguments[1].shape[2]
    ones = torch.tensor([n.bit_count() for n in range(256)], dtype=torch.int32, device=bits.device)
    kept = ones[bits.view(torch.uint8).int()].sum((1, 2, 3))
    ends = (min(end + ROWS, k_len) for end in range((k_len - q_len) // ROWS * ROWS, k_len, ROWS))
    return kept, bits.shape[1] * sum(-(-end // KEYS) for end in ends)


def chosen_again(out: Tensor, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Of `tsa::block_sparse_attention`, which keeps no bitmap: it is made once more, at a recorder's cost."""
    x, k_len, *rule = block_sparse_attention(*arguments, **named)
    return key_blocks(resolve("compose_blocks:chosen_blocks")(x, k_len, *rule), (x.q, x.k), {"k_len": k_len})


def by_itself(result: Tensor, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Of an operator that tells recorders as it chooses, since what it chooses is not its result."""


def pairs_read(bits: Tensor, length: int) -> Tensor:
    """Share of the causal query-key pairs that each list of a bitmap reads of a whole prompt without padding.

    Args:
        bits: `[B, lists, row blocks, words]`.
        length: tokens.

    Returns:
        float64 `[B, lists]`.
    """
    device = bits.device
    begin = torch.arange(bits.shape[2], device=device) * ROWS
    rows = (length - begin).clamp(max=ROWS).double()
    before = torch.arange(bits.shape[3] * 64, device=device) * KEYS < begin[:, None]
    blocks = torch.stack([torch.stack([_set(one, before) for one in of_row]) for of_row in bits])
    pairs = (blocks * KEYS * rows + rows * (rows + 1) / 2).sum(-1)
    return pairs / (length * (length + 1) / 2)


def _set(bits: Tensor, among: Tensor) -> Tensor:
    """Set bits of a list `[row blocks, words]` among some of them, bool `[row blocks, words * 64]`: float64 `[row blocks]`."""
    is_set = (bits[:, :, None] >> torch.arange(64, device=bits.device) & 1).flatten(1).bool()
    return (is_set & among).sum(1).double()
