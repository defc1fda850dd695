"""Systematic sampling in whole numbers: unbiased by enumeration of every offset, of keys and of tiles; Philox."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.kernels.attend.sampled import draw
from tsa_compile.kernels.attend.sampled.reference import value_weights

CASES = {  # masses of 4 to 8 keys
    "equal": [5, 5, 5, 5],
    "one dominates": [1, 1000, 1, 1, 1],
    "one alone": [0, 0, 7, 0],
    "rising": [1, 2, 3, 4, 5, 6, 7, 8],
    "with zeros": [3, 0, 0, 5, 0, 1],
    "large": [1 << 24, (1 << 24) - 1, 12345, 1 << 23],
}


def pieces(masses, samples):
    """Every count that some offset draws, as ((offset, how many offsets draw the same), ...)."""
    total = sum(masses)
    ends = [sum(masses[: r + 1]) for r in range(len(masses))]
    cuts = sorted({0, total} | {-samples * x % total for x in ends})
    return [(a, b - a) for a, b in itertools.pairwise(cuts)]


def one(masses, samples, offset):
    return draw.systematic(torch.tensor(masses), torch.tensor(samples), torch.tensor(offset)).tolist()


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 128])
@pytest.mark.parametrize("case", CASES)
def test_every_key_is_drawn_as_often_as_its_mass_says(case, samples):
    masses = CASES[case]
    total, mean = sum(masses), [Fraction(0)] * len(masses)
    for offset, width in pieces(masses, samples):
        counts = one(masses, samples, offset)
        assert counts == one(masses, samples, offset + width - 1)  # a piece has one answer
        assert sum(counts) == samples
        assert all(abs(c - Fraction(samples * x, total)) < 1 for c, x in zip(counts, masses, strict=True))
        mean = [m + Fraction(c * width, total) for m, c in zip(mean, counts, strict=True)]
    assert mean == [Fraction(samples * x, total) for x in masses]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1 << 24), min_size=1, max_size=64), st.integers(0, 4096), st.integers(0, (1 << 32) - 1))
def test_counts_sum_to_the_samples(masses, samples, word):
    total = sum(masses)
    offset = int(draw.offset_of(torch.tensor(word), torch.tensor(total)))
    assert offset == word * total >> 32
    counts = one(masses, samples, offset)
    assert sum(counts) == (samples if total else 0)
    assert min(counts) >= 0
    assert all(abs(c * total - samples * x) < total for c, x in zip(counts, masses, strict=True) if total)


TILED = {  # logits in base 2, whole numbers, so that masses are the softmax itself
    "equal": [[0.0, 0.0], [0.0, 0.0]],
    "a heavy tile": [[9.0, 1.0], [0.0, -3.0], [2.0, 2.0]],
    "a heavy key": [[-2.0, 0.0, 1.0], [12.0, 0.0, -1.0]],
    "a light tile": [[0.0, 0.0], [-5.0, -6.0], [0.0, 1.0]],
    "a hidden tile": [[1.0, 0.0], [-math.inf, -math.inf], [0.0, 3.0]],
}


@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("case", TILED)
def test_proportional_draws_are_unbiased_over_all_offsets_of_tiles_and_keys(case, samples):
    """The mean of the estimate over every pair of offsets is softmax(logits) V to 1e-12."""
    logits = torch.full((len(TILED[case]), draw.TILE), -math.inf, dtype=torch.float64)
    for t, row in enumerate(TILED[case]):
        logits[t, : len(row)] = torch.tensor(row)
    masses, values = draw.key_masses(logits.flatten()), torch.randn(logits.numel(), 3, dtype=torch.float64)
    of_tiles = draw.tile_masses(masses).tolist()
    mean = torch.zeros_like(logits)
    for offset, width in pieces(of_tiles, samples):
        drawn = one(of_tiles, samples, offset)
        for t, n in enumerate(drawn):  # given the tile's samples its keys do not depend on other tiles
            for inside, part in pieces(masses.keys[t].tolist(), n) if n else ():
                offsets = torch.zeros(len(drawn), dtype=torch.long)
                offsets[t] = inside
                weights = draw.proportional(masses, samples, torch.tensor(offset), offsets)
                share = Fraction(width, sum(of_tiles)) * Fraction(part, int(masses.totals[t]))
                mean[t] += float(share) * weights[t]
    want = torch.softmax(logits.flatten() * math.log(2), 0)
    torch.testing.assert_close(mean.flatten() @ values, want @ values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", TILED)
def test_equal_tiles_are_unbiased_over_all_offsets(case):
    logits = torch.full((len(TILED[case]), draw.TILE), -math.inf, dtype=torch.float64)
    for t, row in enumerate(TILED[case]):
        logits[t, : len(row)] = torch.tensor(row)
    masses, mean = draw.key_masses(logits.flatten()), torch.zeros_like(logits)
    for t, keys in enumerate(masses.keys.tolist()):
        for inside, part in pieces(keys, 2) if sum(keys) else ():
            offsets = torch.zeros(len(logits), dtype=torch.long)
            offsets[t] = inside
            mean[t] += draw.equal_tiles(masses, torch.tensor(2), offsets)[t] * (part / sum(keys))
    torch.testing.assert_close(mean.flatten(), torch.softmax(logits.flatten() * math.log(2), 0), rtol=1e-12, atol=1e-12)


def test_masses_are_the_softmax_to_their_last_digit():
    logits = torch.randn(3, 1000, dtype=torch.float64) * 20
    masses = draw.key_masses(logits)
    shares = masses.keys * torch.exp2(masses.exponents - masses.exponents.amax(-1, keepdim=True))[..., None]
    got = (shares / shares.sum((-1, -2), keepdim=True)).flatten(1)[:, :1000]
    torch.testing.assert_close(got, torch.softmax(logits * math.log(2), -1), rtol=0, atol=2**-22)
    tiles = draw.tile_masses(masses).double()
    torch.testing.assert_close(tiles / tiles.sum(-1, keepdim=True), masses.shares, rtol=0, atol=2**-30)
    assert draw.tile_masses(draw.key_masses(torch.zeros(64 << 10))).sum() == 1 << draw.TOTAL_BITS


def test_what_is_not_finite_has_no_mass():
    logits = torch.tensor([0.0, math.nan, 1.0, math.inf])
    assert draw.key_masses(logits).keys[0, :4].tolist() == [1 << 23, 0, 1 << 24, 0]
    assert draw.key_masses(torch.full((64,), -math.inf)).shares.tolist() == [0]


def test_philox_is_the_published_generator():
    """Vectors of Random123, kat_vectors: philox4x32-10."""
    word = lambda x: torch.tensor(x)  # noqa: E731
    ones = 0xFFFFFFFF
    assert draw.philox(word(0), (word(0),) * 4).item() == 0x6627E8D5
    assert draw.philox(word(-1), (word(ones),) * 4).item() == 0x408F276D
    key = 0x299F31D0_A4093822
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert draw.philox(word(key), tuple(map(word, counter))).item() == 0xD16CFE09


def test_no_word_repeats_between_layers_rows_heads_tiles_or_steps():
    tiles, seen = torch.tensor([*range(5), draw.OF_TILES]), []
    for seed in (7, 8):
        for position in (100, 101):
            seen += draw.random_words(torch.tensor([seed]), torch.tensor([position] * 3), 4, tiles).flatten().tolist()
    assert len(set(seen)) == len(seen) == 2 * 2 * 3 * 4 * 6


def estimates(form, samples, seeds, keys=2048, heads=4):
    """(estimates [seeds, 3], what they are to be) of one head's values, from that many seeds."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 1, keys, generator=g, dtype=torch.float64).expand(seeds, heads, -1)
    values = torch.randn(keys, 3, generator=g, dtype=torch.float64)
    first, end = torch.zeros(seeds, dtype=torch.long), torch.full((seeds,), keys)
    weights = value_weights(logits, first, end, torch.arange(seeds) * 977, samples, form)
    return (weights @ values).flatten(0, 1), torch.softmax(logits[0, 0], -1) @ values


@pytest.mark.parametrize(("form", "samples"), [("prop", 16), ("flash", 32)])
def test_the_mean_over_seeds_is_right(form, samples):
    """Within four standard errors of 2,400 draws."""
    got, want = estimates(form, samples, seeds=600)
    assert ((got.mean(0) - want).abs() <= 4 * got.std(0) / len(got) ** 0.5).all()
    assert (got.std(0) > 0.02).all()


@pytest.mark.parametrize("form", ["prop", "flash"])
def test_the_variance_falls_at_least_as_one_over_the_samples(form):
    numbers = [32, 64, 128, 256, 512] if form == "prop" else [32, 64, 128, 256, 512, 1024]  # flash: of 32 tiles
    logs = []
    for samples in numbers:
        got, want = estimates(form, samples, seeds=100)
        logs.append((math.log(samples), float(((got - want) ** 2).mean().log())))
    x, y = torch.tensor(logs).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    assert slope <= -0.95, slope
