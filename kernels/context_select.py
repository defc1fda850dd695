"""Which key blocks the rows of a rank read in context-parallel prefill: those that one process with every row would choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tsa_compile.kernels.attend.pages.host import key_block_attention
from tsa_compile.kernels.attend.pages.reference import key_block_attention_reference
from tsa_compile.kernels.common.group import gather
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, own_keys, valid_range
from tsa_compile.kernels.common.zigzag import ZigZag, key_blocks_of
from tsa_compile.kernels.score.page_mass.host import key_block_means
from tsa_compile.kernels.score.page_mass.reference import key_block_means_reference
from tsa_compile.kernels.select.threshold_pages.host import select_key_blocks
from tsa_compile.kernels.select.threshold_pages.reference import pack_bits, select_key_blocks_reference

Tensor = torch.Tensor


class Stages(NamedTuple):
    """The operations of block-sparse prefill, on a device."""

    means: Callable[..., tuple[Tensor, Tensor]]
    select: Callable[..., Tensor]
    attend: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, x: Tensor) -> Stages:
        """Those for tensors such as `x`."""
        if x.is_cuda:
            return cls(key_block_means, select_key_blocks, key_block_attention)
        return cls(key_block_means_reference, select_key_blocks_reference, key_block_attention_reference)


class Rule(NamedTuple):
    """The numbers of `tsa::select_key_blocks`, by their names there."""

    scale: float
    alpha: tuple[float, ...]
    pool: int
    window: int
    sinks: int
    last_dense: int
    share: str
    lookahead: bool


class Prompt(NamedTuple):
    """How a prompt lies on the ranks of a group.

    Args:
        cut: its chunks.
        rank: this process' rank.
        group: name of the group.
        start, lengths: int32 `[B]`, which positions are keys (`KvView`); None: all.
        key_mask: bool `[B, length]`, of the whole prompt.
    """

    cut: ZigZag
    rank: int
    group: str
    start: Tensor | None = None
    lengths: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def own(self) -> list[tuple[slice, range]]:
        """(rows of this rank, their positions) of each chunk that it has rows of."""
        first, second = self.cut.of(self.rank)
        both = (slice(0, len(first)), first), (slice(len(first), len(first) + len(second)), second)
        return [(rows, chunk) for rows, chunk in both if chunk]

    def padding(self, end: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`start`, `lengths` and `key_mask` of the positions before `end`."""
        return self.start, self.lengths, None if self.key_mask is None else self.key_mask[:, :end]


def chosen(prompt: Prompt, q: Tensor, k: Tensor, rule: Rule) -> list[Tensor]:
    """For each chunk of `prompt.own` the bitmap `[B, H or Hk, row blocks, words]` that `tsa::select_key_blocks` gives its rows.

    Args:
        prompt: how rows lie.
        q: `[B, H, n, D]`, this rank's rows.
        k: `[B, Hk, past + n, D]`, keys of the past and this rank's.
        rule: how blocks are chosen.
    """
    means, counts = _means(prompt, k)
    before = [] if rule.lookahead else _rows_before(prompt, q)
    found = []
    for n, (rows, chunk) in enumerate(prompt.own):
        blocks = -(-chunk.stop // KEYS)
        asked = torch.cat([before[n], q[:, :, rows]], 2) if before else q[:, :, rows]
        index = means[:, :, :blocks].contiguous(), counts[:, :blocks].contiguous()
        numbers = rule._replace(last_dense=0)  # the last rows of the prompt, not those of the chunk
        bits = Stages.of(q).select(asked, *index, *prompt.padding(chunk.stop), chunk.stop, *numbers)
        skipped = (chunk.start // ROWS) - (chunk.stop - asked.shape[2]) // ROWS
        bits = bits[:, :, skipped:].contiguous()
        found.append(_last_rows_read_all(bits, prompt, chunk, index[1], rule.last_dense) if rule.last_dense else bits)
    return found


def _means(prompt: Prompt, k: Tensor) -> tuple[Tensor, Tensor]:
    """`tsa::key_block_means` of the whole prompt: each rank makes those of its blocks."""
    cut, past, make = prompt.cut, prompt.cut.past, Stages.of(k).means

    def of(rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        mask = prompt.key_mask
        return make(rows, None, None, None if mask is None else mask[:, first : first + rows.shape[2]])

    parts = []
    for rows, chunk in prompt.own:
        begin = chunk.start // KEYS * KEYS  # the past ends in the middle of a block
        held = k[:, :, past + rows.start : past + rows.stop]
        parts.append(of(torch.cat([k[:, :, begin:past], held], 2) if begin < past else held, begin))
    whole = past // KEYS
    before = of(k[:, :, : whole * KEYS], 0)
    own = [torch.cat([before[0][:, :, :0], *(p[0] for p in parts)], 2), torch.cat([before[1][:, :0], *(p[1] for p in parts)], 1)]
    blocks = [[key_blocks_of(chunk) for chunk in cut.of(rank)] for rank in range(cut.ranks)]
    most = max(sum(map(len, of_rank)) for of_rank in blocks)
    means = gather(F.pad(own[0], (0, 0, 0, most - own[0].shape[2])), prompt.group)
    counts = gather(F.pad(own[1], (0, most - own[1].shape[1])), prompt.group)
    found = [before]
    for n, rank in enumerate(cut.holders):
        first = 0 if n < cut.ranks else len(blocks[rank][0])
        end = first + len(blocks[rank][n >= cut.ranks])
        found.append((means[rank][:, :, first:end], counts[rank][:, first:end]))
    return torch.cat([m for m, _ in found], 2), torch.cat([c for _, c in found], 1)


def _rows_before(prompt: Prompt, q: Tensor) -> list[Tensor]:
    """The queries `[B, H, up to 128, D]` of the row block before each chunk of `prompt.own`, with another rank as a rule."""
    ends = [q[:, :, max(rows.start, rows.stop - ROWS) : rows.stop] for rows, _ in prompt.own]
    padded = [F.pad(x, (0, 0, ROWS - x.shape[2], 0)) for x in ends] + [q.new_zeros(*q.shape[:2], ROWS, q.shape[3])] * 2
    of_all = gather(torch.stack(padded[:2]), prompt.group)
    held = {}
    for rank in range(prompt.cut.ranks):
        for n, chunk in enumerate(c for c in prompt.cut.of(rank) if c):
            held[chunk.stop] = of_all[rank, n, :, :, ROWS - min(ROWS, len(chunk)) :]
    return [held.get(chunk.start, q[:, :, :0]) for _, chunk in prompt.own]


def _last_rows_read_all(bits: Tensor, prompt: Prompt, chunk: range, counts: Tensor, last_dense: int) -> Tensor:
    """`bits`, and every block for row blocks with one of the prompt's last `last_dense` rows."""
    batch, length = counts.shape[0], prompt.cut.length
    _, end = valid_range(batch, length, prompt.start, prompt.lengths, bits.device)
    begin, own = own_keys(len(chunk), chunk.stop, end)
    dense = (begin < end[:, None]) & (begin + ROWS > end[:, None] - last_dense)
    at = torch.arange(counts.shape[1], device=bits.device) * KEYS
    visible = (counts > 0)[:, None] & (at < own[..., None] + ROWS)
    return bits | pack_bits(visible & dense[..., None])[:, None]
