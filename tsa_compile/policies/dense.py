"""Dense: leave the site exactly as it is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tsa_compile.policies.base import Policy

if TYPE_CHECKING:
    from tsa_compile.passes.site import AttentionSite


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Attention as the model has it; where its mask was proven to be plainly causal, without the mask tensor."""

    def refuse(self, site: AttentionSite) -> str | None:
        return "policy is Dense"
