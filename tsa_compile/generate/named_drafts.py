"""What users may call a draft: a name, a policy, a plan, or an object that proposes tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tsa_compile.generate.drafts import Draft, PolicyDraft, PromptLookup
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.policies.remembered import Remembered

SHARE = 0.07  # of the keys, that drafts by name read: what Vegas was published with


def sinks_and_window(tokens: int = 1024) -> PageSparse:
    """The first page of 16 tokens and the last `tokens`, whatever the query: the draft of MagicDec and StreamingLLM."""
    recent = -(-tokens // 16)
    return PageSparse(pages=1 + recent, sinks=1, recent=recent)


NAMED: Mapping[str, Callable[[], Draft]] = {
    "verify": lambda: PolicyDraft(Remembered("verify", ratio=SHARE)),
    "layer": lambda: PolicyDraft(Remembered("verify", ratio=SHARE, share="layer")),
    "pages": lambda: PolicyDraft(PageSparse(keep=SHARE)),
    "window": lambda: PolicyDraft(sinks_and_window()),
    "lookup": PromptLookup,
}
MEASURED = "measured"  # the fastest by a table of the machine's, which `speculative` looks up for each request


def as_draft(draft: Policy | Plan | Draft | str) -> Draft:
    """The draft that users mean: a name of `NAMED`, a policy for drafts, a plan with such policies, or a draft.

    Raises:
        ValueError: no such name, or a policy that is not for drafts.
        TypeError: anything else.
    """
    if isinstance(draft, str):
        if draft not in NAMED:
            raise ValueError(f"draft must be a policy for drafts, a plan, or one of {[*NAMED, MEASURED]}, got {draft!r}")
        return NAMED[draft]()
    if isinstance(draft, Plan):
        return plan_draft(draft)
    if isinstance(draft, Policy):
        _check("draft", draft)
        return PolicyDraft(draft)
    if not hasattr(draft, "propose"):
        raise TypeError(f"draft must be a policy for drafts, a plan, or one of {[*NAMED, MEASURED]}, got {type(draft).__name__}")
    return draft


def plan_draft(plan: Plan) -> PolicyDraft:
    """Drafts by a plan's policies of phase "draft", or, where it has none, by those of its decode steps.

    So a plan made for sparse decode, such as that of `learn.head_roles`, drafts what exact steps judge. What the plan says of
    other phases does not matter here.

    Raises:
        ValueError: it has neither, a policy is not for drafts, or two of them have verify steps keep different lists.
    """
    named = [phase for phase in ("draft", "decode") if getattr(plan, phase) or any(rule.phase == phase for rule in plan.rules)]
    if not named:
        raise ValueError("draft: the plan has no policy for draft steps, and none for decode steps")
    phase = named[0]
    policy = getattr(plan, phase) or Dense()
    rules = tuple(rule._replace(phase="draft") for rule in plan.rules if rule.phase == phase)
    _check(f"draft: Plan.{phase}", policy)
    for rule in rules:
        _check(f"draft: the rule for {rule.modules!r}", rule.policy)
    _check_lists([policy, *(rule.policy for rule in rules)])
    reuse = tuple(entry._replace(phase="draft") for entry in plan.reuse or () if entry.phase == phase)
    return PolicyDraft(policy, rules, reuse, plan.weights)


def _check(field: str, policy: Policy) -> None:
    if "draft" not in policy.phases:
        raise ValueError(f"{field}: {policy.name} is for {' and '.join(sorted(policy.phases))}, not for draft")


def _check_lists(policies: list[Policy]) -> None:
    """A cache layer keeps one form of list that verify steps leave."""
    forms = {state.name: policy for policy in policies if "verify" in policy.phases for state in policy.states()}
    if len(forms) > 1:
        raise ValueError(
            f"draft: verify steps keep one form of list for all layers, got {' and '.join(map(str, forms.values()))}"
        )
