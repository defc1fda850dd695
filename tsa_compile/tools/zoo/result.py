"""What became of one model, one attention implementation and one scenario."""

from __future__ import annotations

import dataclasses

NOT_RUN = "not run"


@dataclasses.dataclass
class Result:
    """What happened; errors are the largest difference over the largest output.

    Args:
        status: "ok", "failed", "not offered" (the model has not this implementation or call) or `NOT_RUN`.
        detail: why it is not "ok".
        calls: how often the model was called.
        sites, replaced: attentions found and replaced, over all graphs.
        reasons: reason -> how many sites stay dense for it.
        graphs, breaks: traced graphs and graph breaks, the model's own.
        error: at coverage 0, against dense.
        sparse_errors: of each policy that leaves keys out, against its eager reference; empty: not compared.
    """

    model: str
    library: str
    implementation: str
    scenario: str
    status: str = "ok"
    detail: str = ""
    calls: int = 0
    sites: int = 0
    replaced: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    graphs: int = 0
    breaks: int = 0
    error: float | None = None
    sparse_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


class CheckFailed(Exception):
    """A model does not do what it should; the message says what."""
