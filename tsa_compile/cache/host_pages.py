"""Keys and values of one layer in host memory, page by page."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from tsa_compile.kernels.common.pages import PAGE

MIN_PAGES = 64  # of an allocation; it grows by an eighth at least


class HostMemoryError(RuntimeError):
    """The host has not the memory for the keys and values of a sequence."""


class HostPages:
    """Whole pages, in the order of their positions; each lies in one piece, so that it is copied as one.

    Attributes:
        pages: how many there are.
        keys: `[B, capacity, Hk, 16, D]`, pinned where the layer is on a GPU.
        values: `[B, capacity, Hk, 16, Dv]`.
        real: bool `[B, capacity, 16]`, false: padding.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """For rows like `keys` `[B, Hk, n, D]` and `values`."""
        self.pages = 0
        self._pinned = keys.device.type == "cuda"
        self.keys, self.values = (x.new_empty(x.shape[0], 0, x.shape[1], PAGE, x.shape[3], device="cpu") for x in (keys, values))
        self.real = torch.empty(keys.shape[0], 0, PAGE, dtype=torch.bool)

    @property
    def page_bytes(self) -> int:
        """Of a page of one batch row, keys and values."""
        return sum(math.prod(x.shape[2:]) * x.element_size() for x in (self.keys, self.values))

    def write(self, first: int, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor) -> int:
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
        for own, new in ((self.keys, keys), (self.values, values), (self.real, real)):
            own[:, first:end].copy_(new)
        self.pages = end
        return keys.nbytes + values.nbytes

    def select_batch(self, index: torch.Tensor) -> None:
        """Batch row `i` becomes what row `index[i]` was.

        Raises:
            HostMemoryError: the host has not the memory.
        """
        index = index.cpu()
        chosen = self._allocate(len(index), self.keys.shape[1])
        for new, old in zip(chosen, (self.keys, self.values, self.real), strict=True):
            torch.index_select(old, 0, index, out=new)
        self.keys, self.values, self.real = chosen

    def reserve(self, pages: int) -> None:
        """Room for so many pages, with those that are there.

        Raises:
            HostMemoryError: the host has not the memory.
        """
        held = self.keys.shape[1]
        if pages <= held:
            return
        grown = self._allocate(self.keys.shape[0], max(pages, held + max(MIN_PAGES, held // 8)))
        for new, old in zip(grown, (self.keys, self.values, self.real), strict=True):
            new[:, : self.pages] = old[:, : self.pages]
        self.keys, self.values, self.real = grown

    def _allocate(self, batch: int, pages: int) -> list[torch.Tensor]:
        """Keys, values and real of so many pages, uninitialised."""
        needed, free = pages * batch * self.page_bytes, available_memory()
        message = f"{needed / 2**30:.3f} GiB of host memory for one layer's {pages} pages, batch {batch}"
        if free is not None and needed > free:
            raise HostMemoryError(f"{message}: {free / 2**30:.3f} GiB are free. Use shorter sequences, or a smaller batch")
        try:
            return [
                torch.empty((batch, pages, *x.shape[2:]), dtype=x.dtype, pin_memory=self._pinned and x is not self.real)
                for x in (self.keys, self.values, self.real)
            ]
        except RuntimeError as error:
            pinned = "pinned (page-locked) memory, see `ulimit -l`: " if self._pinned else ""
            raise HostMemoryError(f"{message}: the system refused {pinned}{error}") from error


def available_memory() -> int | None:
    """Bytes that the host can give without swapping; None: it does not say (not Linux)."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024
