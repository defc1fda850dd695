"""What is compared: dense, the paper's setting, completed token-sparse attention, and a strip without selection as the floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tsa_compile.learn.drift import decoder_layer, record_drift
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.token_sparse import Completion, TokenSparse
from tsa_compile.rules import Rule
from tsa_compile.tools.evaluate.runner import Runner

COVERAGES = (0.005, 0.02, 0.05, 0.1, 0.2)
DENSE, PAPER, ALL, INNER, FLOOR, OWN = (
    "dense", "paper, half of the layers", "completed, all layers", "completed, inner layers", "window and sinks only", "own",
)  # fmt: skip
FAMILIES = {"paper": PAPER, "all": ALL, "inner": INNER, "floor": FLOOR}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A plan under test, or None for the model as it is; `coverage` orders the variants of a family, where there is an order."""

    name: str
    family: str
    plan: Plan | None
    coverage: float | None = None


def standard_variants(
    low_drift: Sequence[int],
    layers: Sequence[int],
    depth: int,
    coverages: Sequence[float],
    families: Sequence[str] = tuple(FAMILIES),
) -> list[Variant]:
    """Dense first.

    Args:
        low_drift: the half of `layers` with the lowest drift, which the paper makes sparse.
        layers: those that can be sparse, ascending.
        depth: decoder layers of the model; "inner" leaves the first two and the last dense.
        coverages: one variant of each sparse family for each.
        families: some of FAMILIES.
    """
    wanted = {FAMILIES[f] for f in families}
    strip = Completion()
    inner = tuple(i for i in layers if 2 <= i < depth - 1)
    out = [Variant(DENSE, DENSE, None)]
    for family, chosen, completion in ((PAPER, tuple(low_drift), None), (ALL, tuple(layers), strip), (INNER, inner, strip)):
        if not chosen or family not in wanted:
            continue
        for c in coverages:
            policy = TokenSparse(coverage=c, completion=completion)
            plan = Plan(prefill=Dense(), rules=tuple(Rule(n, "prefill", policy) for n in chosen))
            out.append(Variant(f"{family}, tau {c:g}", family, plan, c))
    # One token a head and the last window are kept; the window lies within the strip.
    floor = TokenSparse(coverage=0.999999, min_tokens=1, completion=Completion(strip.window, strip.sinks, 0))
    return [*out, *([Variant(FLOOR, FLOOR, Plan(floor))] if FLOOR in wanted else [])]


def own_variant(path: str | Path) -> Variant:
    """A policy or a plan from a JSON file.

    Raises:
        ValueError: neither, or one that does not validate; the message names the file.
    """
    return Variant(Path(path).stem, OWN, Plan.load(path))


def low_drift_half(runner: Runner, layers: Mapping[int, str], ids: torch.Tensor) -> list[int]:
    """The paper's choice (arXiv 2602.03216, section 4): of the layers that can be sparse, the half with the lowest drift."""
    paths = {str(n): path for n, module in layers.items() if (path := decoder_layer(module)) is not None}
    with record_drift(runner.decoder, paths) as drift, torch.no_grad():
        runner.decoder(input_ids=ids, use_cache=False)
    return sorted(int(n) for n in sorted(drift, key=drift.__getitem__)[: (len(drift) + 1) // 2])
