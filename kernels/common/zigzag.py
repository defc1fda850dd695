"""How the new rows of a prompt are cut for context parallelism: into twice as many chunks as there are ranks, folded once.

Rank `r` of `R` has the chunks `r` and `2 R - 1 - r`: a causal row reads what lies before it, so a rank with an early chunk gets a
late one too (zig-zag, as in Llama 3's training, arXiv 2407.21783, 3.3.2). Chunks are cut at multiples of 128 positions, so row
blocks and key blocks stay whole and a block of keys is with one rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.kernels.common.group import gather, rank_and_size
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, row_block_count

Tensor = torch.Tensor


class ZigZag(NamedTuple):
    """A prompt's new rows on the ranks of a group.

    Args:
        past: positions before the new rows; every rank has their keys.
        length: positions in all.
        ranks: of the group.
    """

    past: int
    length: int
    ranks: int

    @property
    def chunks(self) -> list[range]:
        """Positions of each chunk, in their order; a short prompt leaves some empty."""
        number, parts, first = row_block_count(self.length - self.past, self.length), 2 * self.ranks, self.past // ROWS
        cuts = [min(max((first + n * number // parts) * ROWS, self.past), self.length) for n in range(parts)]
        return [range(*pair) for pair in zip(cuts, [*cuts[1:], self.length], strict=True)]

    @property
    def holders(self) -> list[int]:
        """The rank that has each chunk."""
        return [min(n, 2 * self.ranks - 1 - n) for n in range(2 * self.ranks)]

    def of(self, rank: int) -> list[range]:
        """The two chunks of a rank, the earlier first."""
        return [self.chunks[n] for n in (rank, 2 * self.ranks - 1 - rank)]

    def rows(self, rank: int) -> int:
        """How many new rows a rank has."""
        return sum(map(len, self.of(rank)))

    def places(self) -> list[tuple[int, int, range]]:
        """(rank, its rows before the chunk, positions) of each chunk, in the order of positions."""
        before = [0 if n < self.ranks else len(self.chunks[2 * self.ranks - 1 - n]) for n in range(2 * self.ranks)]
        return list(zip(self.holders, before, self.chunks, strict=True))


def key_blocks_of(chunk: range) -> range:
    """The key blocks in which a chunk's keys lie; the first of them may hold keys of the past, too."""
    return range(chunk.start // KEYS, -(-chunk.stop // KEYS)) if chunk else range(0)


def gathered(rows: Tensor, cut: ZigZag, group: str) -> Tensor:
    """The new rows `[B, H, length - past, D]` of a prompt; `rows` are this rank's of its two chunks. Every rank calls it.

    Raises:
        ValueError: the rank has another number of rows.
    """
    rank, number = rank_and_size(group)[0], rows.shape[2]
    if number != cut.rows(rank):
        raise ValueError(f"group {group!r}: {number} rows on rank {rank}; of {cut} it has {cut.rows(rank)}")
    most = max(map(cut.rows, range(cut.ranks)))
    of_all = gather(torch.nn.functional.pad(rows, (0, 0, 0, most - number)), group)
    return torch.cat([of_all[rank, :, :, first : first + len(chunk)] for rank, first, chunk in cut.places()], 2)
