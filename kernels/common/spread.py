"""How a sequence is spread over the ranks of a group: page `p` is page `p // ranks` of rank `p % ranks`.

So at every length each rank's rows lie one behind the other, in the order of their positions, and no two ranks differ by more
than a page. A page is 16 rows.
"""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.kernels.common.pages import PAGE

Tensor = torch.Tensor


def rows_held(length: int, rank: int, ranks: int) -> int:
    """Rows that `rank` holds of a sequence of `length` rows."""
    pages, rest = divmod(length, PAGE)
    full = (pages - rank + ranks - 1) // ranks
    return full * PAGE + (rest if pages % ranks == rank else 0)


def positions(rows: int, rank: int, ranks: int, device: Any = None) -> Tensor:
    """int64 `[rows]`: where in the sequence the first `rows` rows of `rank` are."""
    row = torch.arange(rows, device=device)
    return (row // PAGE * ranks + rank) * PAGE + row % PAGE
