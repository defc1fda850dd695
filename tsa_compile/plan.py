"""A plan says which policy each attention gets in each phase; `calibrate` writes it, `transform` applies it, exports embed it."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tsa_compile import pays, plan_format
from tsa_compile.passes.site import PHASES
from tsa_compile.policies.base import Policy, from_dict
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.reuse import Reuse, bind_reuse, read_reuse, route_of
from tsa_compile.rules import Rule, bind, check_policy, read_rules

if TYPE_CHECKING:
    from tsa_compile.passes.site import AttentionSite, Route

WHERE = ("always", "pays")


@dataclasses.dataclass(frozen=True)
class Plan:
    """(attention module, phase) -> policy.

    `Plan(default, {layer: policy})`, the form of the first release, is read as a prefill policy and its exceptions.

    Args:
        prefill: a prompt, or a long part of one.
        decode: one token over a cache.
        verify: a few drafted tokens over a cache, judged at once.
        draft: one token that verification will judge.
        denoise_first: the first denoising step of a block, in block diffusion.
        denoise: the further ones.
        rules: exceptions, `(modules, phase, policy)`, see `Rule`; the first that matches decides.
        reuse: attentions that take another one's selection, `(modules, anchor, heads, phase)`, see `Reuse`. Where that cannot be,
            as across graphs, they select by themselves, and the report has a warning with the reason.
        where: "always": each policy runs wherever it is defined; "pays": not at lengths where it was measured to be slower.
        weights: a safetensors file of learned indexes (`learn/indexer.py`), which `HeadSplit(mass=...)` needs. `transform` makes
            them submodules of the attentions. Files of plans name it from where they are.
        notes: what is known about the plan, such as the loss it was accepted at; JSON values only.

    A phase that is None has the default plan's policy. With "pays", decode is then `Exact` where `transform` knows that it pays.

    Raises:
        ValueError, TypeError: a policy that is not for its phase, or a wrong argument; the message names it.
    """

    prefill: Policy | None = None
    decode: Policy | None = None
    verify: Policy | None = None
    draft: Policy | None = None
    denoise_first: Policy | None = None
    denoise: Policy | None = None
    rules: tuple[Rule, ...] = ()
    reuse: tuple[Reuse, ...] | None = None
    where: str = "always"
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.decode, Mapping):
            self._read_layers(self.decode)
        for phase in PHASES:
            policy = getattr(self, phase)
            if policy is not None:
                check_policy(f"Plan.{phase}", phase, policy)
        object.__setattr__(self, "rules", read_rules(self.rules))
        object.__setattr__(self, "reuse", read_reuse(self.reuse) or None)
        if self.where not in WHERE:
            raise ValueError(f"Plan.where must be one of {WHERE}, got {self.where!r}")
        if not isinstance(self.notes, Mapping):
            raise TypeError(f"Plan.notes must be a mapping, got {type(self.notes).__name__}")
        if self.weights is not None and not isinstance(self.weights, (str, Path)):
            raise TypeError(f"Plan.weights must be the path of a file, got {type(self.weights).__name__}")
        object.__setattr__(self, "weights", None if self.weights is None else str(self.weights))

    def _read_layers(self, layers: Mapping[int, Policy]) -> None:
        """`Plan(default, {layer: policy}, notes)`."""
        warnings.warn(
            "Plan(default, {layer: policy}) is Plan(prefill=default, rules=[(modules, 'prefill', policy)])",
            DeprecationWarning,
            stacklevel=4,
        )
        notes: Any = self.verify
        rules = tuple(Rule(layer, "prefill", policy) for layer, policy in sorted(layers.items()))
        for field, value in (("decode", None), ("verify", None), ("rules", rules), ("notes", notes or {})):
            object.__setattr__(self, field, value)

    def policy_at(self, module: str, phase: str, index: int | None = None) -> Policy:
        """The policy of an attention module in a phase.

        Args:
            module: the module's path.
            phase: one of `PHASES`.
            index: the layer's number where the path has none.
        """
        for rule in self.rules:
            if rule.phase == phase and rule.matches(module, index):
                return rule.policy
        own: Policy | None = getattr(self, phase)
        return own or DEFAULTS[phase]

    @property
    def decodes(self) -> bool:
        """Does it name a policy for decode steps? Otherwise they are the model's own, and need no graph."""
        named = [self.decode, *(rule.policy for rule in self.rules if rule.phase == "decode")]
        return any(policy is not None and not isinstance(policy, Dense) for policy in named)

    def policies(self) -> list[Policy]:
        """Those that a model's own calls may meet: of prefill and decode steps."""
        own = [getattr(self, phase) or DEFAULTS[phase] for phase in ("prefill", "decode")]
        return list(dict.fromkeys([*own, *(rule.policy for rule in self.rules if rule.phase in ("prefill", "decode"))]))

    def policy_for(self, site: AttentionSite) -> Policy:
        return self.policy_at(site.module, site.phase, site.index)

    def pays_from(self, policy: Policy, site: AttentionSite) -> int | None:
        """Keys from which on a policy is to run at a site: 0 with `where="always"`; None: at no length that was measured.

        Of prompts: whether a decode step pays is asked before it, as on buffers of ours dense attention is no faster.
        """
        shared = bool(self.reuse)  # a selection that others read is made at any length
        return 0 if self.where == "always" or shared or site.phase != "prefill" else pays.pays_from(policy.name, site)

    def route_for(self, site: AttentionSite) -> Route | None:
        """Whose selection the site takes; None: its own."""
        return route_of(self.reuse or (), site)

    def bind(self, model: nn.Module) -> Plan:
        """The plan for this model: layer numbers become paths, and every rule matches some module.

        Raises:
            ValueError: a rule matches no module, or a layer's number is found in several stacks of layers.
        """
        return self.bind_to(name for name, _ in model.named_modules())

    def bind_to(self, modules: Iterable[str]) -> Plan:
        """The same, by the paths of a model's modules."""
        if not self.rules and not self.reuse:
            return self
        paths = list(modules)
        return dataclasses.replace(self, rules=tuple(bind(self.rules, paths)), reuse=tuple(bind_reuse(self.reuse or (), paths)))

    def to_dict(self) -> dict[str, Any]:
        return plan_format.write(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote, in this release or the first.

        Raises:
            ValueError, TypeError: not a plan, a newer format, or a field that does not validate; the message names it.
        """
        return cls(**plan_format.read(data))

    def save(self, path: str | Path) -> None:
        folder = Path(path).absolute().parent
        named = self.weights if self.weights is None else os.path.relpath(self.weights, folder)
        Path(path).write_text(json.dumps(dataclasses.replace(self, weights=named).to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan of a JSON file that holds one, or a policy. Raises ValueError, naming the file, if it holds neither."""
        try:
            plan = as_plan(json.loads(Path(path).read_text()))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from error
        return plan if plan.weights is None else dataclasses.replace(plan, weights=str(Path(path).parent / plan.weights))


DEFAULTS: Mapping[str, Policy] = {phase: Dense() for phase in PHASES} | {"prefill": BlockSparse()}


def as_plan(policy_or_plan: Policy | Plan | Mapping[str, Any] | None) -> Plan:
    """A plan from what users pass: None (the default plan), a policy (in the phases that it is for), a plan, or either as a dict.

    Raises:
        TypeError: anything else.
        ValueError: a dict that is no policy and no plan; the message names the field.
    """
    if policy_or_plan is None:
        return Plan(prefill=DEFAULTS["prefill"], where="pays")
    if isinstance(policy_or_plan, Plan):
        return policy_or_plan
    if isinstance(policy_or_plan, Mapping):
        if "policy" not in policy_or_plan:
            return Plan.from_dict(policy_or_plan)
        policy_or_plan = from_dict(dict(policy_or_plan))
    if isinstance(policy_or_plan, Policy):
        phases: dict[str, Any] = {phase: policy_or_plan for phase in PHASES if phase in policy_or_plan.phases}
        return Plan(**phases)
    raise TypeError(f"expected a policy, a plan, a dict of either, or None; got {type(policy_or_plan).__name__}")


def default_policy(coverage: float | None = None) -> Policy:
    """The prefill policy of `transform(model)`; with a coverage, `TokenSparse` of it."""
    return BlockSparse() if coverage is None else TokenSparse(coverage=coverage)


def without_session(plan: Plan) -> Plan:
    """The plan, for attention outside of a session.

    Raises:
        ValueError: a policy needs what only a session does.
    """
    named = [*(getattr(plan, phase) for phase in PHASES), *(rule.policy for rule in plan.rules)]
    for policy in named:
        if policy is not None and policy.needs_session:
            raise ValueError(f"{policy.name} needs what tsa_compile.transform does around a model's calls: use that")
    if plan.reuse:
        raise ValueError("Plan.reuse needs the graph of several layers that tsa_compile.transform has: use that")
    return plan
