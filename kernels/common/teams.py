"""Teams of a page: each of its rows belongs to the most similar of up to four of them, its representative. 64 bits a page.

Bits `2 r` and `2 r + 1`: the team of row `r`. Bits `32 + 4 s` to `35 + 4 s`: the row that represents team `s`. From bit 48 on:
how many teams there are. A row that is padding counts nowhere; its bits are 0. Source: SANTA++, arXiv 2609.35629.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.pages import PAGE

Tensor = torch.Tensor
SLOTS = 4  # teams of a page, at most
REPRESENTATIVES, NUMBER = 32, 48  # first bits


def pack(team: Tensor, representatives: Tensor, number: Tensor) -> Tensor:
    """int64 `[...]` of the teams of rows `[..., 16]`, representatives `[..., 4]` and how many there are `[...]`, all int64."""
    bits = (team << (2 * torch.arange(PAGE, device=team.device))).sum(-1)
    bits += (representatives << (REPRESENTATIVES + 4 * torch.arange(SLOTS, device=team.device))).sum(-1)
    return bits + (number << NUMBER)


def unpack(teams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack` was given."""
    rows, slots = (torch.arange(n, device=teams.device) for n in (PAGE, SLOTS))
    return (
        (teams[..., None] >> (2 * rows)) & 3,
        (teams[..., None] >> (REPRESENTATIVES + 4 * slots)) & 15,
        (teams >> NUMBER) & 7,
    )


def teams_of(keys: Tensor, real: Tensor, count: int) -> Tensor:
    """The teams of pages: int64 `[...]`.

    The first representative is the row nearest the mean; each further one is the row farthest from those there are, unless it
    equals one of them. Of equal distances the first row. A row joins the nearest one, of equally near ones the first.

    Args:
        keys: `[..., 16, D]`, in the dtype that distances are computed in.
        real: bool `[..., 16]`, false: padding.
        count: representatives, 1 to 4, at most.
    """
    weights = real.to(keys.dtype)[..., None]
    mean = (keys * weights).sum(-2, keepdim=True) / weights.sum(-2, keepdim=True).clamp(min=1)
    nearest = torch.where(real, _distance(keys, mean), torch.inf).argmin(-1)
    near = torch.where(real, _distance(keys, _row(keys, nearest)), -1.0)
    team, number = torch.zeros_like(real, dtype=torch.long), real.any(-1).long()
    representatives = [nearest]
    for s in range(1, count):
        farthest = near.argmax(-1)
        more = near.amax(-1) > 0
        distance = _distance(keys, _row(keys, farthest))
        closer = more[..., None] & (distance < near)
        team, near = torch.where(closer, s, team), torch.where(closer, distance, near)
        representatives.append(torch.where(more, farthest, 0))
        number = number + more
    representatives += [torch.zeros_like(nearest)] * (SLOTS - count)
    some = (number > 0)[..., None]
    return pack(torch.where(real, team, 0), torch.where(some, torch.stack(representatives, -1), 0), number)


def _distance(keys: Tensor, to: Tensor) -> Tensor:
    return (keys - to).square().sum(-1)


def _row(keys: Tensor, row: Tensor) -> Tensor:
    """`[..., 1, D]`."""
    return keys.gather(-2, row[..., None, None].expand(*row.shape, 1, keys.shape[-1]))
