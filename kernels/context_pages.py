"""Key blocks that go from rank to rank in context-parallel prefill: those that a row of the other rank reads, and no others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.group import gather, send
from tsa_compile.kernels.common.row_blocks import KEYS, key_block_count
from tsa_compile.kernels.common.zigzag import ZigZag, key_blocks_of
from tsa_compile.kernels.context_select import Prompt

Tensor = torch.Tensor


def travelled(prompt: Prompt, k: Tensor, v: Tensor, lists: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values by position, `[B, Hk, blocks * 64, D]`: of the past, of this rank, and of the blocks that `lists` name.

    All others are zero. The host waits for the device once, for how many blocks go where.

    Args:
        prompt: how rows lie.
        k, v: `[B, Hk, past + n, D]`, of the past and of this rank.
        lists: for each chunk of `prompt.own`, the bitmap of its row blocks.
    """
    rank, ranks = prompt.rank, range(prompt.cut.ranks)
    keys, values = _in_place(prompt, k), _in_place(prompt, v)
    owner = _owners(prompt.cut, k.device)
    wanted = gather(_wanted(prompt.cut, k, lists).view(torch.uint8), prompt.group).bool()
    numbers = _numbers(wanted, owner, len(ranks)).tolist()  # of key blocks: [the rank that asks][the one that has them]
    here = [0 if r == rank else numbers[r][rank] for r in ranks]
    there = [0 if r == rank else numbers[rank][r] for r in ranks]
    leaving = torch.cat([_first(wanted[r] & (owner == rank), here[r]) for r in ranks])
    coming = torch.cat([_first(wanted[rank] & (owner == r), there[r]) for r in ranks])
    blocks = [x.view(-1, KEYS * x.shape[3]) for x in (keys, values)]
    found = send(torch.cat([x[leaving] for x in blocks], 1), here, there, prompt.group)
    for x, part in zip(blocks, found.split([x.shape[1] for x in blocks], 1), strict=True):
        x[coming] = part
    return keys, values


def _in_place(prompt: Prompt, rows: Tensor) -> Tensor:
    """Rows `[B, Hk, past + n, D]` at their positions, `[B, Hk, blocks * 64, D]`, among zeros."""
    past = prompt.cut.past
    whole = rows.new_zeros(*rows.shape[:2], key_block_count(prompt.cut.length) * KEYS, rows.shape[3])
    whole[:, :, :past] = rows[:, :, :past]
    for held, chunk in prompt.own:
        whole[:, :, chunk.start : chunk.stop] = rows[:, :, past + held.start : past + held.stop]
    return whole


def _wanted(cut: ZigZag, k: Tensor, lists: Sequence[Tensor]) -> Tensor:
    """bool `[B, Hk, key blocks]`: does a row of the chunks, in a head of the KV head, read the block?"""
    wanted = torch.zeros(*k.shape[:2], key_block_count(cut.length), dtype=torch.bool, device=k.device)
    for bits in lists:
        octets = bits.view(torch.uint8)  # [B, lists, row blocks, words * 8]
        read = torch.stack([(octets & (1 << n) != 0).any(2) for n in range(8)], -1).flatten(2)
        number = min(read.shape[2], wanted.shape[2])
        wanted[..., :number] |= read.unflatten(1, (k.shape[1], -1)).any(2)[..., :number]
    return wanted


def _owners(cut: ZigZag, device: torch.device) -> Tensor:
    """int64 `[key blocks]`: the rank that has each block; -1: the past, which all have."""
    owner = torch.full((key_block_count(cut.length),), -1, device=device)
    for rank, _, chunk in cut.places():
        blocks = key_blocks_of(chunk)
        owner[blocks.start : blocks.stop] = rank
    return owner


def _numbers(wanted: Tensor, owner: Tensor, ranks: int) -> Tensor:
    """int64 `[ranks, ranks]`: of the blocks that rank `i` reads, `wanted[i]`, how many rank `j` has."""
    of_block = wanted.sum((1, 2))
    return of_block.new_zeros(len(wanted), ranks + 1).index_add(1, owner + 1, of_block)[:, 1:]


def _first(mask: Tensor, number: int) -> Tensor:
    """int64 `[number]`: where `mask` holds, of which the host knows the number; so it need not wait, as for `nonzero`."""
    return torch.argsort((~mask.flatten()).byte(), stable=True)[:number]
