"""Hugging Face attention implementation `"tsa"`, for those who do not want to trace: the same policies and operators.

`register()`, then `from_pretrained(..., attn_implementation="tsa")`. `transform(model, front="interface")` does the same for one
model, and reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsa_compile.interface.attention import Front, register_front
from tsa_compile.plan import Plan, as_plan, without_session
from tsa_compile.policies.base import Policy


def register(policy_or_plan: Policy | Plan | Mapping[str, Any] | None = None, name: str = "tsa") -> None:
    """Make `attn_implementation=name` known to transformers (5.17 or later).

    Args:
        policy_or_plan: as in `transform`; a plan is read by the modules' `layer_idx`.
        name: the implementation's name; several with different policies may be registered.

    Raises:
        ImportError: transformers is not installed.
        TypeError: `policy_or_plan` is none of the above.
    """
    register_front(Front(without_session(as_plan(policy_or_plan))), name)
