"""The plan that speculation runs under: the model's own, its drafts by the draft's policy, all that it keeps by `Exact`."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from typing import Any

from tsa_compile import api
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.session import Session, attached

log = logging.getLogger("tsa_compile")
#: By session and policy: (the plan it was made of, the plan). Recorded steps are found by a plan's identity.
_PLANS: weakref.WeakKeyDictionary[Session, dict[Policy | None, tuple[Plan, Plan]]] = weakref.WeakKeyDictionary()


def session_of(model: Any, draft: Policy | None) -> Session:
    """The model's session; a model without one is transformed, and the log says so."""
    session = attached(model)
    if session is None:
        api.transform(model, speculating(Plan(prefill=Dense()), draft))
        log.warning(
            "speculation has transformed the %s: dense prefill, exact decode; tsa_compile.restore(model) undoes it",
            type(model).__name__,
        )
        session = attached(model)
        assert session is not None
    return session


def plan_of(session: Session, draft: Policy | None) -> Plan:
    """The same object for the same draft, as long as the session's own plan stays."""
    known = _PLANS.setdefault(session, {})
    own = session.plan
    if draft not in known or known[draft][0] is not own:
        known[draft] = (own, speculating(own, draft))
    return known[draft][1]


def speculating(plan: Plan, draft: Policy | None) -> Plan:
    """`plan` with exact decode and verify steps, and drafts by `draft`, which may need to see the verify steps."""
    verify = draft if draft is not None and "verify" in draft.phases else Exact()
    rules = tuple(rule for rule in plan.rules if rule.phase not in ("decode", "verify", "draft"))
    return dataclasses.replace(plan, decode=Exact(), verify=verify, draft=draft, rules=rules)
