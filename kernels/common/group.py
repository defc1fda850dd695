"""Process groups by name, and what their ranks exchange: `torch.distributed` with errors that say what happened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

Tensor = torch.Tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)  # its name from 2.13 on


class GroupError(RuntimeError):
    """The ranks of a process group could not exchange: one has ended, or takes no part."""


def default_group() -> str:
    """The name of the group of all processes.

    Raises:
        GroupError: there is none in this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise GroupError("no process group: start with torchrun and call torch.distributed.init_process_group() first")
    return str(dist.distributed_c10d._get_default_group().group_name)


def find_group(name: str) -> Any:
    """The process group of that name (`group.group_name`).

    Raises:
        GroupError: this process is in no such group.
    """
    default_group()
    for group, known in dist.distributed_c10d._world.pg_names.items():
        if known == name:
            return group
    known_names = sorted(dist.distributed_c10d._world.pg_names.values())
    raise GroupError(f"group {name!r}: this process is in no process group of that name; its groups are {known_names}")


def rank_and_size(name: str) -> tuple[int, int]:
    """(this process' rank, number of ranks) of the group."""
    group = find_group(name)
    return int(dist.get_rank(group)), int(dist.get_world_size(group))


def gather(x: Tensor, name: str) -> Tensor:
    """Every rank's `x`, of one shape and dtype, in the order of ranks: `[ranks, *x.shape]`."""
    group = find_group(name)
    size = dist.get_world_size(group)
    found = x.new_empty(size * x.numel())
    with _exchange(name):
        _all_gather(found, x.contiguous().flatten(), group=group)
    return found.view(size, *x.shape)


def scatter(x: Tensor, name: str) -> Tensor:
    """`x[r]` goes to rank `r`; returns what each rank sent here, in the order of ranks: `[ranks, ...]` again."""
    found = torch.empty_like(x, memory_format=torch.contiguous_format)
    with _exchange(name):
        dist.all_to_all_single(found, x.contiguous(), group=find_group(name))
    return found


def send(x: Tensor, here: Sequence[int], there: Sequence[int], name: str) -> Tensor:
    """The first `here[0]` entries of `x` go to rank 0, the next `here[1]` to rank 1 and so on; returns what the ranks sent here,
    `there[r]` entries from rank `r`, in their order."""
    found = x.new_empty(sum(there), *x.shape[1:])
    with _exchange(name):
        dist.all_to_all_single(found, x.contiguous(), list(there), list(here), group=find_group(name))
    return found


def total(x: Tensor, name: str) -> Tensor:
    """The sum over ranks of `x`, int64: the same bits whatever the order."""
    with _exchange(name):
        dist.all_reduce(x, group=find_group(name))
    return x


def check_agreement(operator: str, facts: Mapping[str, int], device: torch.device, name: str) -> None:
    """Every rank must call an operator with the same numbers, or all of them raise.

    Of CPU tensors alone: elsewhere the host would wait for the device at each call.

    Raises:
        ValueError: a rank's number differs; on every rank.
    """
    if device.type == "cpu":
        number_of_each(operator, facts, 0, device, name)


def number_of_each(operator: str, facts: Mapping[str, int], own: int, device: torch.device, name: str) -> list[int]:
    """`own` of every rank, in their order, where all call an operator with the same `facts`. The host waits for the device.

    Raises:
        ValueError: a rank's fact differs; on every rank.
    """
    table = gather(torch.tensor([*facts.values(), own], device=device), name).tolist()
    for rank, row in enumerate(table):
        for fact, first, other in zip(facts, table[0], row, strict=False):
            if first != other:
                numbers = f"{first} on rank 0, {other} on rank {rank}"
                raise ValueError(f"{operator}: ranks of group {name!r} differ in {fact}: {numbers}")
    return [row[-1] for row in table]


@contextlib.contextmanager
def _exchange(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupError(f"group {name!r}: a rank has ended, or takes no part in this call: {error}") from error
