"""OverGroup: what the policies that spread one sequence over a process group share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from tsa_compile.kernels.common.group import default_group
from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Policy, from_dict


@dataclasses.dataclass(frozen=True)
class OverGroup(Policy, abstract=True):
    """Base of policies over a process group, every rank of which runs the same model on the same tokens.

    Args:
        inner: which keys are read.
        group: name of the process group (`group.group_name`); None: all processes.

    Raises:
        ValueError: `group` is neither.
    """

    needs_session: ClassVar[bool] = True

    inner: Policy
    group: str | None = None

    def __post_init__(self) -> None:
        if self.group is not None and not (isinstance(self.group, str) and self.group):
            raise ValueError(f"{self.name}.group must be the name of a process group, or None, got {self.group!r}")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "inner": self.inner.to_dict()}

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Policy:
        if isinstance(fields.get("inner"), dict):
            fields = {**fields, "inner": from_dict(fields["inner"])}
        return super()._from_fields(fields)

    @property
    def group_name(self) -> str:
        """The group's name in this process.

        Raises:
            GroupError: there is no process group.
        """
        return self.group or default_group()

    def guaranteed(self, site: AttentionSite) -> Edges:
        return self.inner.guaranteed(site)
