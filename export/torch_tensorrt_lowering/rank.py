"""Thresholds without a sort: TensorRT's TopK stops at 3,840 entries, and it has no float64.

Each step compares all entries with up to 15 candidates and counts, so a threshold is found 4 bits at a time. Both functions give
the sets of the reference (`kernels/common/coverage_reference.py`), ties included. Numbers above 31 bits meet no `where`:
Torch-TensorRT makes 32-bit ones of them there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsa_compile.export.torch_tensorrt_lowering.rows import running_sum

Tensor = torch.Tensor
_UNIT_BITS = 62  # units are below 2**52 * heads, of which there are at most 2**10
_SCALE = 2.0**60  # exact, and no score is subnormal any more: the least is 2**-89
_POWERS = [0.0, *(2.0 ** (16 * i - 96) for i in range(11))]  # [0]: nothing is reached


def largest(score: Tensor, count: Tensor) -> Tensor:
    """Members of the `count` largest of each row, ties by lowest position; bool `[B, G, n]`.

    score: float32 `[B, G, n]`, candidates in [0, 2**18], others -1. count: int64 `[b, 1, 1]`.
    """
    scaled = score * _SCALE
    threshold = _least_of_largest(scaled, count)
    above, equal = scaled > threshold, scaled == threshold
    missing = count - above.long().sum(2, keepdim=True)
    return above | (equal & (running_sum(equal) <= missing))


def _least_of_largest(x: Tensor, count: Tensor) -> Tensor:
    """The `count`-th largest value of each row of x `[B, G, n]`, or 0 if that is not positive; float32 `[B, G, 1]`."""

    def reached(candidates: Tensor) -> Tensor:
        """How many of the ascending candidates `[B, G, m]` at least `count` values reach; int64 `[B, G, 1]`."""
        hits = (x[:, :, None] >= candidates[..., None]).long().sum(3)
        return (hits >= count).long().sum(2, keepdim=True)

    powers = constants(_POWERS, x.device)
    step = torch.arange(1, 16, device=x.device)
    base = _entry(powers, reached(powers[1:].expand(*x.shape[:2], -1)))
    doubled = constants([2.0**i for i in range(16)], x.device)
    value = base * _entry(doubled, reached(base * doubled[1:]))
    delta = value
    for bits in (4, 4, 4, 4, 4, 3):  # the mantissa; all sums are exact
        delta = delta * 2.0**-bits
        value = value + delta * reached(value + delta * step[: 2**bits - 1].to(x.dtype)).to(x.dtype)
    return value


def constants(values: list[float], device: torch.device) -> Tensor:
    """These numbers, float32 `[n]`: by fills, since a decomposition may make no tensor of data."""
    return torch.cat([torch.full((1,), x, device=device) for x in values])


def _entry(table: Tensor, index: Tensor) -> Tensor:
    """table `[n]` at index `[B, G, 1]`."""
    return F.embedding(index[..., 0], table[:, None])


def dropped(units: Tensor, candidate: Tensor, coverage: float) -> Tensor:
    """How many of the lightest candidates together stay below `coverage` of the mass; int64 `[b, 1]`.

    units: int64 `[B, n]`, 0 where `candidate` (bool `[b, n]`) is false. The target is computed from `coverage * 2**56`, rounded,
    so it differs from the reference's by a few units of 2**-52.
    """
    target = _target(units.sum(1, keepdim=True), round(coverage * 2**56))

    def mass_below(value: Tensor) -> Tensor:
        """Sums of the units below each of value `[B, m]`."""
        return (units[:, None] * (units[:, None] < value[..., None]).long()).sum(2)

    step = torch.arange(1, 16, device=units.device)
    value = torch.zeros_like(target)
    for shift in (*range(_UNIT_BITS - 4, 0, -4), 0):
        candidates = value + _shifted(step[: 15 if shift else 3], shift)
        value = value + _shifted((mass_below(candidates) < target).long().sum(1, keepdim=True), shift)
    smaller = ((units < value) & candidate).long().sum(1, keepdim=True)
    missing = target - mass_below(value) - 1
    return smaller + missing.clamp(min=0) // value.clamp(min=1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x * 2**bits, by factors of 32 bits: Torch-TensorRT takes no larger number."""
    return x * 2**bits if bits <= 30 else x * 2**30 * 2 ** (bits - 30)


def _target(total: Tensor, coverage: int) -> Tensor:
    """ceil(total * coverage / 2**56) from 28-bit digits; total below 2**62."""
    base = 2**28
    c1, c0 = divmod(coverage, base)
    t1 = total // base
    t0 = total - t1 * base
    low = t0 * c0
    carry = low // base
    middle = t1 * c0 + t0 * c1 + carry
    whole = middle // base
    rest = (middle - whole * base) + (low - carry * base)
    return t1 * c1 + whole + (rest > 0).long()
