"""What listed pages may hold of the attention, by their bases, in plain PyTorch. Contract: docs/operators.md, `refine_scores`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.page_basis import HIDDEN, unpack
from tsa_compile.kernels.common.pages import CHUNK, PAGE, listed_pages, page_view, pages_of
from tsa_compile.kernels.common.view import row_range, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def refine_scores_reference(
    q: Tensor,
    logits: Tensor,
    counts: Tensor,
    basis: Tensor,
    coords: Tensor,
    scales: Tensor,
    indices: Tensor | None,
    list_counts: Tensor | None,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`tsa::refine_scores` on any device: (logits `[B, H, rows, P]`, parts `[B, H, rows, ceil(P / 64)]`)."""
    view = KvView(blocks, block, start, lengths)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, pages = q.shape[0], pages_of(capacity)
    whole = torch.arange(pages, device=q.device) < (row_range(capacity, batch, view, q.device)[1] // PAGE)[:, None]
    numbers, c, s = (_in_order(x, view, pages) for x in (basis, coords, scales))
    n = _in_order(counts[..., None], view, pages)[:, :, None, None, :, 0].to(dtype)  # [B, 1, 1, 1, P]
    grouped = q.to(dtype).unflatten(1, (basis.shape[1], -1))
    along = torch.einsum("bghqd,bgprd->bghqpr", grouped, unpack(numbers, dtype)) * (scale * s.to(dtype))[:, :, None, None]
    rest = torch.einsum("bghqpr,bgpri->bghqpi", along, c.to(dtype))
    rest = rest.masked_fill((c[..., 0, :] == HIDDEN)[:, :, None, None], -torch.inf)
    old = logits.to(dtype).unflatten(1, (basis.shape[1], -1))
    new = old - torch.log(n) + torch.logsumexp(rest, -1)
    new = new.masked_fill(~new.isfinite() | ~old.isfinite(), -torch.inf)
    if indices is not None:
        assert list_counts is not None
        new = torch.where(listed_pages(indices, list_counts, pages)[:, :, None, None], new, old)
    new = new.masked_fill(~whole[:, None, None, None], -torch.inf).flatten(1, 2)
    padded = torch.nn.functional.pad(new, (0, -pages % CHUNK), value=-torch.inf)
    return new.float(), torch.logsumexp(padded.unflatten(-1, (-1, CHUNK)), -1).float()


def _in_order(x: Tensor, view: KvView, pages: int) -> Tensor:
    """An index `[N, n, P', ...]` by position: `[B, n, pages, ...]`; a last page that is not full may have no entry: 0."""
    flat = rows_in_order(x.flatten(3), page_view(view))[:, :, :pages].unflatten(3, x.shape[3:])
    missing = pages - flat.shape[2]
    return flat if missing <= 0 else torch.cat([flat, flat.new_zeros(*flat.shape[:2], missing, *flat.shape[3:])], 2)
