"""Token selection for encoders and vision towers, where no query comes last: queries spread evenly probe which keys matter.

Ours, not from a paper; MInference (arXiv 2407.02490) scores all keys by the last queries of a prefill. Every query attends, so no
row loses its output; only keys are dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.edges import Edges
from tsa_compile.kernels.types import Keys, Selection
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit, Policy, check_int, check_share


@dataclasses.dataclass(frozen=True)
class ProbeSparse(Policy):
    """Bidirectional and cross attention to the keys that hold most of the probes' attention. No default: ask for it.

    Args:
        coverage: share of the probes' attention mass that may be dropped, in [0, 1); 0 keeps every key.
        probes: queries that score the keys, evenly spread.
        min_keys: kept keys, at least; rows of up to `min_keys + 1` keys keep all of them.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    masks: ClassVar[frozenset[str]] = frozenset({"bidirectional"})

    coverage: float = 0.05
    probes: int = 64
    min_keys: int = 256

    def __post_init__(self) -> None:
        check_share(self, "coverage")
        check_int(self, "probes", 1)
        check_int(self, "min_keys", 1)

    def refuse(self, site: AttentionSite) -> str | None:
        return None

    def guaranteed(self, site: AttentionSite) -> Edges:
        all_kept = isinstance(site.k_len, int) and site.k_len <= self.min_keys + 1
        return Edges.every() if all_kept or self.coverage == 0 else Edges.none()

    def kernel_lengths(self) -> tuple[int, ...]:
        return (self.min_keys + 1,)

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Keys:
        x, rule = site.operands, (float(self.coverage), self.probes, self.min_keys)
        return Keys(*emit(torch.ops.tsa.select_keys.default, x.q, x.k, *x.view.order, site.scale, *rule))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        assert isinstance(selection, Keys)
        x = site.operands
        return emit(torch.ops.tsa.key_attention.default, x.q, x.k, x.v, *selection, site.scale)[0]
