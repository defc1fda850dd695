"""Shares as whole numbers, so that host, reference and kernels agree to the entry."""

from __future__ import annotations

from typing import Any

ONE = 1 << 30  # a share of 1


def share_bits(share: float) -> int:
    """A share in [0, 1] as a whole number of 2**-30, rounded down: 0.07 of 100 are 7, not the 8 of its float."""
    return int(share * ONE)


def share_of(number: Any, bits: Any) -> Any:
    """ceil(share * number): a number, or an int64 tensor; `bits` from `share_bits`."""
    return (number * bits + ONE - 1) // ONE
