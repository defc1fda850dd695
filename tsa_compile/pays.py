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
    """One policy against PyTorch's SDPA: causal prefill of one prompt, half precision, launched from Python as in a model.

    Args:
        capability: of the GPU, such as "9.0".
        policy: its class's name; measured with its default fields.
        head_dim, heads, kv_heads: of the attention.
        lengths: tokens, growing.
        dense_ms, sparse_ms: milliseconds a call at each length.
        kept: share of the key blocks, or keys, that the policy read at each.
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
    if site.device.type != "cuda" or not torch.cuda.is_available():
        return 0
    capability = "{}.{}".format(*torch.cuda.get_device_capability(site.device))
    rows = [row for row in table() if row.capability == capability and row.policy == policy]
    if not rows:
        return 0
    return min(rows, key=lambda row: _distance(row, site)).pays_from


def lengths(policies: Collection[str], device: torch.device) -> set[int]:
    """Every number of keys from which on one of the policies was measured to pay on a device like this."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return set()
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    found = {row.pays_from for row in table() if row.capability == capability and row.policy in policies}
    return {n for n in found if n is not None}


def _distance(row: Timing, site: AttentionSite) -> tuple[float, float]:
    """How far a row is from a site: by the head dim, then by the number of heads."""
    heads = site.heads if isinstance(site.heads, int) else row.heads
    dim = max(d for d in (site.head_dim, site.v_head_dim) if isinstance(d, int))
    return abs(math.log(row.head_dim / dim)), abs(math.log(row.heads / heads))


@functools.cache
def table() -> tuple[Timing, ...]:
    """The user's rows, then those that the package ships; of equal ones the first counts."""
    return tuple(row for path in (tuned_file(), SHIPPED) for row in read(path))


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
    case = lambda row: (row.capability, row.policy, row.head_dim, row.heads, row.kv_heads)  # noqa: E731
    merged = {case(row): row for row in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in merged.values())
    path.write_text(f"[\n{lines}\n]\n")
    table.cache_clear()


def tuned_file() -> Path:
    """Where `tsa-compile tune` writes: TSA_PAYS, or pays.json in the user's cache folder."""
    return Path(os.environ.get("TSA_PAYS", user_cache() / "pays.json"))
