"""What calibrations share: a name for the numbers of a measurement, and what an error of each layer counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

FLOOR = 0.05  # of the layers' mean cost: what each counts at least, as differences of measurements are rough


def named(kind: str, numbers: Mapping[str, Sequence[float]]) -> str:
    """A name for the numbers of layers in a state file: what `kind` they are of, and a hash."""
    text = json.dumps({layer: list(x) for layer, x in numbers.items()}, sort_keys=True)
    return f"{kind} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def weights(costs: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, float]:
    """What an error of each layer counts, so that the errors at which `costs` were measured sum to these."""
    least = FLOOR * sum(max(c, 0.0) for c in costs.values()) / len(costs)
    if least == 0:
        return dict.fromkeys(costs, 1.0)
    return {layer: max(cost, least) / max(errors[layer], 1e-12) for layer, cost in costs.items()}
