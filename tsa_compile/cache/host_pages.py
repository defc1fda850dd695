"""Keys and values of one layer in host memory, page by page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tsa_compile.kernels.common.pages import PAGE

Tensor = torch.Tensor
MIN_PAGES = 64  # of an allocation


class HostMemoryError(RuntimeError):
    """The host has not the memory for the keys and values of a sequence."""


class Segment(NamedTuple):
    """Pages from `first` on, in allocations of their own.

    Args:
        first: number of the first page.
        keys: `[B, n, Hk, 16, D]`, pinned where the layer is on a GPU; each page lies in one piece, so that it is copied as one.
        values: `[B, n, Hk, 16, Dv]`.
    """

    first: int
    keys: Tensor
    values: Tensor

    @property
    def end(self) -> int:
        return self.first + self.keys.shape[1]


class HostPages:
    """Whole pages, in the order of their positions. Segments stay where they are when more pages come.

    Attributes:
        pages: how many there are.
        segments: where they lie; the last may have room for more.
        real: bool `[B, pages, 16]`, false: padding.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """For rows like `keys` `[B, Hk, n, D]` and `values`."""
        self.pages, self._pinned = 0, keys.device.type == "cuda"
        self._page = tuple(x.new_empty(0, 0, x.shape[1], PAGE, x.shape[3], device="cpu") for x in (keys, values))
        self.segments: list[Segment] = []
        self.real = torch.empty(keys.shape[0], 0, PAGE, dtype=torch.bool)

    @property
    def batch(self) -> int:
        return self.real.shape[0]

    @property
    def page_bytes(self) -> int:
        """Of a page of one batch row, keys and values."""
        return sum(math.prod(x.shape[2:]) * x.element_size() for x in self._page)

    @property
    def nbytes(self) -> int:
        """Of all segments, room for more pages included."""
        return sum(s.keys.nbytes + s.values.nbytes for s in self.segments)

    def write(self, first: int, keys: Tensor, values: Tensor, real: Tensor) -> int:
        """The pages from `first` on become these, and there are no others behind them; returns the bytes that were copied.

        Args:
            keys: `[B, n, Hk, 16, D]`, on any device.
            values: `[B, n, Hk, 16, Dv]`.
            real: bool `[B, n, 16]`.

        Raises:
            HostMemoryError: there is no room; what was there stays.
        """
        end = first + keys.shape[1]
        self.reserve(end)
        for segment in self.segments:
            low, high = max(first, segment.first), min(end, segment.end)
            if low < high:
                for own, new in ((segment.keys, keys), (segment.values, values)):
                    own[:, low - segment.first : high - segment.first].copy_(new[:, low - first : high - first])
        self.real = torch.cat([self.real[:, :first], real.cpu()], 1)
        self.pages = end
        return keys.nbytes + values.nbytes

    def crop(self, pages: int) -> None:
        """Only the first `pages` are left."""
        self.pages, self.real = pages, self.real[:, :pages]

    def page(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hk, 16, D]` of one page."""
        segment = next(s for s in self.segments if s.first <= number < s.end)
        return segment.keys[:, number - segment.first], segment.values[:, number - segment.first]

    def whole(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values of all pages as rows `[B, Hk, pages * 16, D]` on a device."""
        found = []
        for n, page in enumerate(self._page):
            parts = [s[1:][n][:, : max(0, self.pages - s.first)].to(device) for s in self.segments]
            parts = parts or [page.new_empty(self.batch, 0, *page.shape[2:], device=device)]
            pages = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            found.append(pages.transpose(1, 2).flatten(2, 3))
        return found[0], found[1]

    def by_segment(self, moves: Sequence[tuple[int, int, int]]) -> Iterator[tuple[Segment, list[tuple[int, int, int]]]]:
        """`moves`, (batch row, page, slot) each, of every segment that has some, with pages counted from its first."""
        for segment in self.segments:
            own = [(row, page - segment.first, slot) for row, page, slot in moves if segment.first <= page < segment.end]
            if own:
                yield segment, own

    def select_batch(self, index: Tensor) -> None:
        """Batch row `i` becomes what row `index[i]` was.

        Raises:
            HostMemoryError: the host has not the memory; what was there stays.
        """
        index, chosen = index.cpu(), []
        for segment in self.segments:
            chosen.append(self._allocate(len(index), segment.first, segment.keys.shape[1]))
            for new, old in zip(chosen[-1][1:], segment[1:], strict=True):
                torch.index_select(old, 0, index, out=new)
        self.segments, self.real = chosen, self.real[index]

    def reserve(self, pages: int) -> None:
        """Room for so many pages, with those that are there.

        Raises:
            HostMemoryError: the host has not the memory; what was there stays.
        """
        held = self.segments[-1].end if self.segments else 0
        if pages <= held:
            return
        self._check_room(self.batch, pages - held)
        more: list[Segment] = []
        for number in self._pieces(pages - held):
            more.append(self._allocate(self.batch, held, number))
            held += number
        self.segments += more

    def _pieces(self, pages: int) -> Iterator[int]:
        """Pages of each segment that together hold `pages`: as PyTorch rounds pinned memory up to powers of two, the most pages
        that such an allocation of keys holds, and the rest likewise."""
        each = max(1, self.batch * math.prod(self._page[0].shape[2:]) * self._page[0].element_size())
        while pages > 0:
            fitting = [(1 << n) // each for n in range(each.bit_length() - 1, 64) if 0 < (1 << n) // each <= pages]
            number = max(MIN_PAGES, max(fitting, default=0))
            yield number
            pages -= number

    def _check_room(self, batch: int, pages: int) -> None:
        needed, free = pages * batch * self.page_bytes, available_memory()
        if free is not None and needed > free:
            short = f"{free / 2**30:.3f} GiB are free. Use shorter sequences, or a smaller batch"
            raise HostMemoryError(f"{self._needed(batch, pages)}: {short}")

    def _needed(self, batch: int, pages: int) -> str:
        return (
            f"{pages * batch * self.page_bytes / 2**30:.3f} GiB of host memory for {pages} more pages of a layer, batch {batch}"
        )

    def _allocate(self, batch: int, first: int, pages: int) -> Segment:
        """Uninitialised."""
        self._check_room(batch, pages)
        try:
            keys, values = (torch.empty((batch, pages, *x.shape[2:]), dtype=x.dtype, pin_memory=self._pinned) for x in self._page)
        except RuntimeError as error:
            pinned = "pinned (page-locked) memory, see `ulimit -l`: " if self._pinned else ""
            raise HostMemoryError(f"{self._needed(batch, pages)}: the system refused {pinned}{error}") from error
        return Segment(first, keys, values)


def available_memory() -> int | None:
    """Bytes that the host can give without swapping; None: it does not say (not Linux)."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024
