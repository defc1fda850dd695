"""Systematic sampling of keys by their attention, in whole numbers: what the kernels compute, in plain PyTorch.

A key's *mass* is `round(2**24 exp(s - bound))`, where `bound` is a power of two not below the largest `exp(s)` of its tile of 64
keys. So sums of masses are exact and have no order, tiles differ by powers of two, and a draw is unbiased to the last digit with
respect to them: of masses `x_1..x_n` with sum `T`, `X_r = x_1 + ... + x_r`, `S` samples and an offset `o`, uniform in `[0, T)`,
`c_r = floor((o + S X_r) / T) - floor((o + S X_{r-1}) / T)` has `E[c_r] = S x_r / T`, `|c_r - S x_r / T| < 1` and `sum c = S`.
Source: SANTA, arXiv 2605.01910; that tiles get their samples in the same way, and not by rounding, is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor
TILE = 64  # keys
MASS_BITS = 24  # of the largest mass
TOTAL_BITS = 50  # of the sum over a row's tiles: times 4,096 samples it fits 63 bits
OF_TILES = 0xFFFFFFFF  # in place of a tile's number: the offset of the draw among tiles
MASK = 0xFFFFFFFF
LOG2_E = 1.4426950408889634


class Masses(NamedTuple):
    """What a row's keys weigh, tile by tile.

    Args:
        keys: int64 `[..., tiles, 64]`, from 0 to 2**24.
        totals: int64 `[..., tiles]`, their sums.
        exponents: float64 `[..., tiles]`: whole numbers; a mass of the tile counts `2**(exponent - 24)`.
    """

    keys: Tensor
    totals: Tensor
    exponents: Tensor

    @property
    def shares(self) -> Tensor:
        """Each tile's part of all, float64 `[..., tiles]`; 0 where there is nothing."""
        top = self.exponents.masked_fill(self.totals == 0, -torch.inf).amax(-1, keepdim=True)
        mass = self.totals.double() * torch.exp2(self.exponents - top.masked_fill(top == -torch.inf, 0.0))
        return (mass / mass.sum(-1, keepdim=True)).nan_to_num(0.0)


def key_masses(logits: Tensor) -> Masses:
    """Masses of logits `[..., keys]` in base 2; a key whose logit is not finite has none."""
    logits = logits.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    pad = -logits.shape[-1] % TILE
    tiles = torch.nn.functional.pad(logits, (0, pad), value=-torch.inf).unflatten(-1, (-1, TILE))
    exponents = tiles.amax(-1).ceil()
    exponents = exponents.masked_fill(exponents == -torch.inf, 0.0)
    keys = torch.floor(torch.exp2(tiles - exponents[..., None]) * 2.0**MASS_BITS + 0.5).long()
    return Masses(keys, keys.sum(-1), exponents)


def spare_bits(tiles: int) -> int:
    """By how many bits the totals of the heaviest of so many tiles are raised, so that those of lighter ones keep theirs."""
    return TOTAL_BITS - MASS_BITS - TILE.bit_length() + 1 - (max(1, tiles) - 1).bit_length()


def tile_masses(masses: Masses) -> Tensor:
    """The totals in one unit for all tiles, rounded: int64 `[..., tiles]`."""
    top = masses.exponents.masked_fill(masses.totals == 0, -torch.inf).amax(-1, keepdim=True)
    lower = (top - masses.exponents).nan_to_num(0.0, 0.0, 0.0).clamp(0, 62).long() - spare_bits(masses.totals.shape[-1])
    rounded = (masses.totals + (1 << (lower - 1).clamp(0))) >> lower.clamp(0)
    return torch.where(lower > 0, rounded, masses.totals << (-lower).clamp(0))


def systematic(masses: Tensor, samples: Tensor, offset: Tensor) -> Tensor:
    """How often each of `masses` int64 `[..., n]` is drawn: int64 `[..., n]`.

    Args:
        samples: int64 `[...]`, 0 to 4,096.
        offset: int64 `[...]`, in [0, sum); any where the sum is 0.
    """
    total = masses.sum(-1, keepdim=True)
    ends = masses.cumsum(-1)
    passed = [(offset[..., None] + samples[..., None] * x) // total.clamp(min=1) for x in (ends - masses, ends)]
    return torch.where(total > 0, passed[1] - passed[0], 0)


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The first word of Philox-4x32-10 (Salmon and others, 2011): int64 in [0, 2**32). `key` int64, the four words alike."""
    low, high = key & MASK, (key >> 32) & MASK
    a, b, c, d = torch.broadcast_tensors(*counter)
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57  # their upper halves are right, though int64 wraps
        a, b, c, d = (
            ((right >> 32) & MASK) ^ b ^ low, right & MASK,
            ((left >> 32) & MASK) ^ d ^ high, left & MASK,
        )  # fmt: skip
        low, high = (low + 0x9E3779B9) & MASK, (high + 0xBB67AE85) & MASK
    return a


def random_words(seed: Tensor, position: Tensor, heads: int, tiles: Tensor) -> Tensor:
    """A word for each row of the batch, query head and tile: int64 `[B, H, len(tiles)]` in [0, 2**32).

    Args:
        seed: int64 `[1]` or `[B]`, another one for each layer.
        position: int `[B]`, of the query.
        tiles: int64 `[n]`, numbers of tiles, or `OF_TILES`.
    """
    batch = torch.arange(position.shape[0], device=position.device)
    counter = (tiles, torch.arange(heads, device=position.device)[:, None], batch[:, None, None], position.long()[:, None, None])
    return philox(seed[:, None, None], counter)


def offset_of(word: Tensor, total: Tensor) -> Tensor:
    """`floor(word * total / 2**32)`, of a total below 2**50."""
    return (word * (total >> 20) + (word * (total & 0xFFFFF) >> 20)) >> 12


def proportional(masses: Masses, samples: int, of_tiles: Tensor, in_tiles: Tensor) -> Tensor:
    """Form "prop": weights float64 `[..., tiles, 64]`, multiples of `1 / samples`, by which values are added.

    Args:
        of_tiles: int64 `[...]`, the offset of the draw among tiles, below the sum of `tile_masses`.
        in_tiles: int64 `[..., tiles]`, of the draws among the keys of each tile, below its total.
    """
    drawn = systematic(tile_masses(masses), torch.full_like(of_tiles, samples), of_tiles)
    return systematic(masses.keys, drawn, in_tiles).double() / samples


def equal_tiles(masses: Masses, samples: Tensor, in_tiles: Tensor) -> Tensor:
    """Form "flash": every tile gets `samples` `[...]` of them, and counts by its share. Weights as those of `proportional`."""
    drawn = samples[..., None].expand_as(masses.totals)
    return systematic(masses.keys, drawn, in_tiles).double() / drawn[..., None] * masses.shares[..., None]
