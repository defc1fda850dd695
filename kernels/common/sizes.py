"""Whole numbers of hosts. Triton's functions of these names can be called in kernels as well, and take microseconds for it."""

from __future__ import annotations


def cdiv(number: int, size: int) -> int:
    """How many pieces of `size` hold `number`; the last may be partial."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
