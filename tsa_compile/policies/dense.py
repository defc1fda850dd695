"""Dense: leave the site exactly as it is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.site import MASKS, PHASES, AttentionSite
from tsa_compile.policies.base import Policy, own_edges
from tsa_compile.policies.why_dense import step


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Attention as the model has it; where its mask was proven to be plainly causal, without the mask tensor."""

    masks: ClassVar[frozenset[str]] = frozenset(MASKS)
    phases: ClassVar[frozenset[str]] = frozenset(PHASES)

    def refuse(self, site: AttentionSite) -> str | None:
        return "policy is Dense" if site.phase == "prefill" else step(site)

    def guaranteed(self, site: AttentionSite) -> Edges:
        return own_edges(site)
