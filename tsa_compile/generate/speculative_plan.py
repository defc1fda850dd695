"""The plan that speculation runs under: the model's own, its drafts by the draft's policies, all that it keeps by `Exact`."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from typing import Any

from tsa_compile import api
from tsa_compile.generate.drafts import Draft, PolicyDraft
from tsa_compile.index_weights import check_indexes
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.rules import Rule
from tsa_compile.session import Session, attached

log = logging.getLogger("tsa_compile")
OVER_CACHE = ("decode", "verify", "draft")
NO_MODEL = PolicyDraft(Dense())  # drafts that ask no model: none of its steps runs
#: By session and policies: (the plan it was made of, the plan). Recorded steps are found by a plan's identity.
_PLANS: weakref.WeakKeyDictionary[Session, dict[PolicyDraft, tuple[Plan, Plan]]] = weakref.WeakKeyDictionary()


def session_of(model: Any, draft: Draft) -> Session:
    """The model's session; a model without one is transformed, and the log says so."""
    session = attached(model)
    if session is None:
        api.transform(model, speculating(Plan(prefill=Dense(), weights=_policies(draft).weights), draft))
        log.warning(
            "speculation has transformed the %s: dense prefill, exact decode; tsa_compile.restore(model) undoes it",
            type(model).__name__,
        )
        session = attached(model)
        assert session is not None
    return session


def plan_of(session: Session, draft: Draft) -> Plan:
    """The same object for the same draft, as long as the session's own plan stays.

    Raises:
        ValueError: a rule of the draft's matches no module of the model, or it needs learned indexes that the model's plan lacks.
    """
    known, key = _PLANS.setdefault(session, {}), _policies(draft)
    own = session.plan
    if key not in known or known[key][0] is not own:
        if key.weights not in (None, own.weights):
            raise ValueError(
                f"draft: its policies go by the indexes of {key.weights}, the model's plan has those of {own.weights}: "
                f"transform(model, Plan(..., weights={key.weights!r})) takes them"
            )
        plan, model = speculating(own, draft), session.backend.model
        if model is not None:
            plan = plan.bind(model)
            check_indexes(model, plan)
        known[key] = (own, plan)
    return known[key][1]


def speculating(plan: Plan, draft: Draft) -> Plan:
    """`plan` with exact decode and verify steps, and drafts by the draft's policies, which may need to see the verify steps."""
    own = _policies(draft)
    rules = tuple(rule for rule in plan.rules if rule.phase not in OVER_CACHE)
    for rule in own.rules:
        rules += (rule, Rule(rule.modules, "verify", _verify(rule.policy)))
    reuse = tuple(entry for entry in plan.reuse or () if entry.phase not in OVER_CACHE) + own.reuse
    verify = _verify(own.policy)
    return dataclasses.replace(plan, decode=Exact(), verify=verify, draft=own.policy, rules=rules, reuse=reuse or None)


def _policies(draft: Draft) -> PolicyDraft:
    """The policies of a draft's steps of the model."""
    if draft.policy is None:
        return NO_MODEL
    return PolicyDraft(draft.policy, getattr(draft, "rules", ()), getattr(draft, "reuse", ()), getattr(draft, "weights", None))


def _verify(draft: Policy) -> Policy:
    """What verify steps run under: exact, also where they remember for the drafts behind them."""
    return draft if "verify" in draft.phases and not isinstance(draft, Dense) else Exact()
