"""Which draft was measured to be the fastest on this machine: what `draft="measured"` goes by.

`tsa-compile bench round MODEL --acceptance FILE` times whole rounds, and keeps them here with the tokens that the model's own
drafts give.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tsa_compile.generate.payoff import Cost, distance
from tsa_compile.kernels.common.user_cache import user_cache

COMMAND = "`tsa-compile bench acceptance MODEL --json FILE`, then `tsa-compile bench round MODEL --acceptance FILE`"


@dataclasses.dataclass(frozen=True)
class DraftTiming:
    """One draft on one machine, as `tsa-compile bench round` has timed it.

    Args:
        device: name of the GPU, or "cpu".
        model: see `shape_of`.
        compiler: of the model's graphs: eager or inductor.
        batch, length: rows, and tokens of the context.
        draft: its name.
        policy: what it ran under, as `Policy.to_dict` has it.
        gamma: tokens of a draft.
        given: tokens of a row in a round, by the model's own acceptance.
        draft_ms, verify_ms: of a step.
        round_ms: of a round, with all that the host does.
        exact_ms: of a token of `generate()` by `Exact`.
    """

    device: str
    model: str
    compiler: str
    batch: int
    length: int
    draft: str
    policy: Mapping[str, Any]
    gamma: int
    given: float
    draft_ms: float
    verify_ms: float
    round_ms: float
    exact_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows."""
        return 1e3 * self.batch * self.given / self.round_ms

    @property
    def cost(self) -> Cost:
        """The gate's line: steps such that a round of them takes what whole rounds took."""
        scale = self.round_ms / (self.gamma * self.draft_ms + self.verify_ms) / self.exact_ms
        return Cost(self.batch, self.length, self.draft_ms * scale, self.verify_ms * scale, self.given)

    def __str__(self) -> str:
        where = f"{self.batch} x {self.length} tokens on {self.device}"
        exact = 1e3 * self.batch / self.exact_ms
        return f"{self.draft}, gamma {self.gamma}: {self.tokens_per_second:.1f} tokens/s, exact decoding {exact:.1f}, at {where}"


def best(model: Any, compiler: str, batch: int, length: int, gamma: int | None = None) -> tuple[DraftTiming, tuple[Cost, ...]]:
    """The draft with the most tokens a second where it was measured nearest to this batch and length, and its table for the gate.

    Args:
        model: of transformers.
        compiler: of its session.
        batch, length: of the request; the batch counts first, both by their ratio.
        gamma: tokens of a draft; None: whatever was fastest.

    Raises:
        ValueError: nothing was measured for a model of this shape on this device; the message names the command that does.
    """
    device, shape = device_of(model), shape_of(model)
    wanted = {"device": device, "model": shape, "compiler": compiler} | ({} if gamma is None else {"gamma": gamma})
    rows = [row for row in read(table_file()) if all(getattr(row, name) == value for name, value in wanted.items())]
    if not rows:
        told = f"{shape}, compiler {compiler}" + ("" if gamma is None else f", gamma {gamma}")
        raise ValueError(
            f'draft="measured": {table_file()} has no rounds of this model ({told}) on {device}; measure with {COMMAND}'
        )
    nearest = min(rows, key=lambda row: distance(row, batch, length))
    found = max((r for r in rows if (r.batch, r.length) == (nearest.batch, nearest.length)), key=lambda r: r.tokens_per_second)
    return found, tuple(row.cost for row in rows if (row.draft, row.gamma) == (found.draft, found.gamma))


def device_of(model: Any) -> str:
    """The name of the model's GPU, or "cpu"."""
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device.type)


def shape_of(model: Any) -> str:
    """What the times of a model of transformers depend on."""
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = f"{config.num_attention_heads}/{kv_heads} heads"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{config.model_type}, {config.num_hidden_layers} layers, {heads}, {config.hidden_size} wide, {dtype}"


def read(path: Path) -> list[DraftTiming]:
    """The rows of a file, none if it is not there.

    Raises:
        ValueError: it holds something else; the message names it.
    """
    if not path.is_file():
        return []
    try:
        return [DraftTiming(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no table of drafts: {error}") from error


def write(rows: Iterable[DraftTiming], path: Path) -> None:
    """Add rows to a file, in place of older ones of the same case."""
    case = lambda row: (row.device, row.model, row.compiler, row.batch, row.length, row.draft, row.gamma)  # noqa: E731
    merged = {case(row): row for row in (*read(path), *rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in merged.values())
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(f"[\n{lines}\n]\n")
    os.replace(fresh, path)  # an interruption leaves no half of it


def table_file() -> Path:
    """Where `tsa-compile bench round` writes: TSA_DRAFTS, or drafts.json in the user's cache folder."""
    return Path(os.environ.get("TSA_DRAFTS", user_cache() / "drafts.json"))
