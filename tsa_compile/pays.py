"""From which length on a policy is faster than dense attention, as it was measured: what `Plan(where="pays")` goes by.

The package ships what was measured on the GPUs that its authors had; `tsa-compile tune` measures the user's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tsa_compile.kernels.common.user_cache import user_cache

if TYPE_CHECKING:
    from tsa_compile.passes.site import AttentionSite

SHIPPED = Path(__file__).with_name("pays.json")


@dataclasses.dataclass(frozen=True)
class Timing:
    """One policy against PyTorch's SDPA, in half precision: causal prefill of one prompt, launched from Python as in a model; or,
    of `Exact`, one layer's decode step with what appends its row, in CUDA graphs (`tools/bench/decode_pays.py`).

    Args:
        capability: of the GPU, such as "9.0".
        policy: its class's name; measured with its default fields.
        head_dim, heads, kv_heads: of the attention.
        lengths: tokens, growing; of a decode step, with its own.
        dense_ms, sparse_ms: milliseconds a call at each length.
        kept: share of the key blocks, or keys, that the policy read at each.
        batch: rows of the batch.
    """

    capability: str
    policy: str
    head_dim: int
    heads: int
    kv_heads: int
    lengths: tuple[int, ...]
    dense_ms: tuple[float, ...]
    sparse_ms: tuple[float, ...]
    kept: tuple[float, ...]
    batch: int = 1

    @property
    def case(self) -> tuple[object, ...]:
        """What was measured: of two rows with the same, one counts."""
        return self.capability, self.policy, self.head_dim, self.heads, self.kv_heads, self.batch

    @property
    def pays_from(self) -> int | None:
        """The shortest length from which on the policy was faster at every one; None: at the longest it was not."""
        found = None
        for length, dense, sparse in zip(self.lengths[::-1], self.dense_ms[::-1], self.sparse_ms[::-1], strict=True):
            if sparse > dense:
                break
            found = length
        return found


def pays_from(policy: str, site: AttentionSite) -> int | None:
    """Keys from which on a policy pays at a site like this; 0: nothing is known of its device; None: at no length measured."""
    if not is_measured(policy, site.device):
        return 0
    dim = max(d for d in (site.head_dim, site.v_head_dim) if isinstance(d, int))
    return measured_from(policy, site.device, dim, site.heads, site.kv_heads)


def is_measured(policy: str, device: torch.device) -> bool:
    """Is anything known of a policy on a device like this?"""
    return bool(_rows({policy}, device))


def measured_from(policy: str, device: torch.device, head_dim: int, heads: Any, kv_heads: Any) -> int | None:
    """Keys from which on a policy pays at every batch that was measured; None: of one of them, at no length.

    By the rows nearest in head dim, then in heads, then in KV heads; heads that are no number are as near to all.

    Raises:
        ValueError: nothing is known of the device.
    """
    rows = _rows({policy}, device)
    if not rows:
        raise ValueError(f"{policy} was not measured on a device like {device}")

    def distance(row: Timing) -> tuple[float, ...]:
        sizes = ((row.head_dim, head_dim), (row.heads, heads), (row.kv_heads, kv_heads))
        return tuple(abs(math.log(of / wanted)) if isinstance(wanted, int) else 0.0 for of, wanted in sizes)

    nearest = min(rows, key=distance)
    found = [row.pays_from for row in rows if row.case[:-1] == nearest.case[:-1]]
    return None if None in found else max(n for n in found if n is not None)


def lengths(policies: Collection[str], device: torch.device) -> set[int]:
    """Every number of keys from which on one of the policies was measured to pay on a device like this."""
    return {row.pays_from for row in _rows(policies, device) if row.pays_from is not None}


def _rows(policies: Collection[str], device: torch.device) -> list[Timing]:
    """Those of such a device; none of one that is no GPU."""
    own = capability(device)
    return [row for row in table() if row.capability == own and row.policy in policies]


def capability(device: torch.device) -> str | None:
    """The compute capability of a GPU that is there, such as "9.0"; None of other devices."""
    is_there = device.type == "cuda" and torch.cuda.is_available()
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if is_there else None


@functools.cache
def table() -> tuple[Timing, ...]:
    """The user's rows, then those that the package ships; of equal cases the first."""
    rows: dict[object, Timing] = {}
    for row in (*read(tuned_file()), *read(SHIPPED)):
        rows.setdefault(row.case, row)
    return tuple(rows.values())


def read(path: Path) -> list[Timing]:
    """The rows of a file, none if it is not there.

    Raises:
        ValueError: it holds something else; the message names it.
    """
    if not path.is_file():
        return []
    try:
        return [_timing(row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of timings: {error}") from error


def _timing(row: dict[str, Any]) -> Timing:
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in row.items()}
    return Timing(**fields)


def write(rows: list[Timing], path: Path) -> None:
    """Add rows to a file, in place of older ones of the same case."""
    merged = {row.case: row for row in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in merged.values())
    path.write_text(f"[\n{lines}\n]\n")
    table.cache_clear()


def tuned_file() -> Path:
    """Where `tsa-compile tune` writes: TSA_PAYS, or pays.json in the user's cache folder."""
    return Path(os.environ.get("TSA_PAYS", user_cache() / "pays.json"))
