"""`--additional-config '{"tsa": {...}}'`: a plan, and what only a server needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tsa_compile import plan_format
from tsa_compile.passes.site import PHASES
from tsa_compile.plan import Plan, as_plan
from tsa_compile.policies.base import Policy, check_int
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.policies.page_sparse import PageSparse

PLAN_FIELDS = ("format", "version", "phases", "rules", "reuse", "where", "notes")
READS_ALL = (Dense, Exact)  # the engine's own decode reads every key, as both say


@dataclasses.dataclass(frozen=True)
class Options:
    """What the backend does.

    Args:
        plan: the policies; `prefill` is `BlockSparse()` where nothing else is said.
        min_context: rows of a batch with fewer tokens, cached ones included, run dense: a row has launches of its own, and short
            ones do not pay for them.

    Raises:
        ValueError: a number outside its range, or a plan with what vLLM's engine cannot be told; the message names it.
    """

    plan: Plan
    min_context: int = 2048

    def __post_init__(self) -> None:
        check_int(self, "min_context", 0)
        if self.plan.where != "always":
            raise ValueError(f"tsa.where must be 'always' in vLLM (min_context says what is too short), got {self.plan.where!r}")
        if self.plan.reuse:
            raise ValueError("tsa.reuse: in vLLM each layer selects by itself, as its attentions are called one by one")
        for phase in PHASES[1:]:
            named = [getattr(self.plan, phase), *(rule.policy for rule in self.plan.rules if rule.phase == phase)]
            self._check(phase, [policy for policy in named if policy is not None])
        if self.plan.prefill is None:
            object.__setattr__(self, "plan", dataclasses.replace(self.plan, prefill=BlockSparse()))

    @property
    def prefill(self) -> Policy:
        """Of layers that no rule names."""
        assert self.plan.prefill is not None
        return self.plan.prefill

    def _check(self, phase: str, policies: list[Policy]) -> None:
        allowed: tuple[type[Policy], ...] = {"decode": (*READS_ALL, PageSparse), "verify": READS_ALL}.get(phase, ())
        for policy in policies:
            if not isinstance(policy, allowed):
                known = " or ".join(x.__name__ for x in allowed)
                raise ValueError(f"tsa: in vLLM {phase} is {known or 'not told apart'}, got {policy.name}")
            if isinstance(policy, PageSparse) and not policy.by_means:
                raise ValueError(f"tsa: in vLLM pages are ranked by mean keys, without completion, got {policy}")


def read(additional_config: Any) -> Options:
    """The options of an engine whose `additional_config` this is.

    Raises:
        ValueError, TypeError: an unknown or wrong option; the message names it.
    """
    given = additional_config.get("tsa") if isinstance(additional_config, Mapping) else None
    if given is None:
        return Options(Plan())
    if not isinstance(given, Mapping):
        raise TypeError(f"tsa must be an object, got {type(given).__name__}")
    fields = dict(given)
    own = {f.name: fields.pop(f.name) for f in dataclasses.fields(Options) if f.name in fields and f.name != "plan"}
    return Options(_plan(fields), **own)


def _plan(fields: dict[str, Any]) -> Plan:
    """A file of a plan, one policy, or a plan whose header is left out."""
    if "plan" in fields:
        if len(fields) > 1:
            raise ValueError(f"tsa.plan is a file that holds the whole plan: leave out {sorted(set(fields) - {'plan'})[0]!r}")
        return _load(fields["plan"])
    if "policy" in fields:
        plan = as_plan(fields)
        return plan if plan.decode is None else dataclasses.replace(plan, draft=None)  # which vLLM does not tell apart
    unknown = sorted(set(fields) - set(PLAN_FIELDS))
    if unknown:
        raise ValueError(f"tsa has no option {unknown[0]!r}; its options are {['min_context', 'plan', 'policy', *PLAN_FIELDS]}")
    return Plan.from_dict({"format": plan_format.NAME, "version": plan_format.VERSION, **fields})


def _load(path: Any) -> Plan:
    if not isinstance(path, str):
        raise TypeError(f"tsa.plan must be the path of a plan's file, got {type(path).__name__}")
    try:
        return Plan.load(path)
    except OSError as error:
        raise ValueError(f"tsa.plan: {error}") from error


def check_arguments(arguments: Any) -> None:
    """Of vLLM's `EngineArgs`: our options, and that they are for us.

    Raises:
        ValueError, TypeError: as `read`; or options without the backend that they are for.
    """
    read(arguments.additional_config)
    config = getattr(arguments, "attention_config", None)
    chosen = [getattr(arguments, "attention_backend", None), *(getattr(config, x, None) for x in ("backend", "backend_per_kind"))]
    if "tsa" in (arguments.additional_config or {}) and "CUSTOM" not in str(chosen):
        raise ValueError(
            "additional_config has options for tsa, which is another attention backend: add --attention-backend CUSTOM"
        )


def check_model(config: Any) -> None:
    """Of vLLM's `VllmConfig`: that the backend can serve the model at all.

    Raises:
        ValueError: its attention is MLA, for which vLLM has backends of another kind.
    """
    backend = config.attention_config.backend
    if getattr(backend, "name", None) == "CUSTOM" and getattr(config.model_config, "use_mla", False):
        raise ValueError(
            "tsa_compile: the model's attention is MLA, which backend CUSTOM does not serve: leave --attention-backend out"
        )
