"""Calls of a model whose prompts are spread over a process group: each rank computes its rows, and all have the result."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from tsa_compile.cache.entry import prepare
from tsa_compile.context_model import cache_of, check_cache, check_model, layers_of, with_cache, without_rows
from tsa_compile.context_parts import TOKENS, Part
from tsa_compile.kernels.common.group import rank_and_size
from tsa_compile.kernels.common.row_blocks import row_block_count
from tsa_compile.kernels.common.zigzag import ZigZag, gathered
from tsa_compile.partial_steps import dense_sites
from tsa_compile.plan import DEFAULTS
from tsa_compile.policies.context_parallel import ContextParallel

if TYPE_CHECKING:
    from tsa_compile.backend import Backend
    from tsa_compile.plan import Plan
    from tsa_compile.policies.base import Policy
    from tsa_compile.steps import Steps


class Spread(NamedTuple):
    """How the prompts of a plan are spread.

    Args:
        whole: the plan by which each rank computes a whole call.
        group: name of the process group.
        rank: of this process.
        ranks: how many there are.
    """

    whole: Plan
    group: str
    rank: int
    ranks: int


class ContextCalls:
    """What is done around each call of a session: nothing, unless the plan's prefill policies are `ContextParallel`.

    Args:
        backend: the session's.
        steps: the session's.
    """

    def __init__(self, backend: Backend, steps: Steps) -> None:
        self._backend, self._steps = backend, steps
        self._known: tuple[Plan, Spread | None] | None = None
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def run(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`call(*args, **kwargs)`, the session's compiled call."""
        plan, drafting = self._backend.running
        if self._known is None or self._known[0] is not plan:
            self._known = plan, spread_of(plan)
        spread = self._known[1]
        if spread is None:
            return self._steps.run(call, args, kwargs)
        if len(args) > 1:
            raise ValueError(f"ContextParallel: {len(args)} arguments without names; name all but the first")
        given = {**self._steps.named(args), **kwargs}
        rows = next((given[name].shape[1] for name in TOKENS if isinstance(given.get(name), torch.Tensor)), 0)
        if rows > 1:
            given = with_cache(self._model, given)
            cache = cache_of(given)
            past = 0 if cache is None else int(cache.get_seq_length())
            if row_block_count(rows, past + rows) >= 2 * spread.ranks:
                self._count(f"spread over {spread.ranks} ranks")
                return self._spread(call, given, spread, ZigZag(past, past + rows, spread.ranks))
            self._count("whole on every rank")
            self._prepare(given, spread)
        with self._backend.under(spread.whole, drafting):
            return self._steps.run(call, (), given)

    def counts(self) -> dict[str, int]:
        """How prompts ran, and how many; none where the plan spreads none."""
        with self._lock:
            return dict(self._counts)

    @property
    def _model(self) -> nn.Module:
        model = self._backend.model
        assert model is not None
        return model

    def _count(self, how: str) -> None:
        with self._lock:
            self._counts[how] += 1

    def _prepare(self, given: Mapping[str, Any], spread: Spread) -> Any:
        """The call's cache, whose layers are ours from now on; None: it has none."""
        prepared = prepare((), given, self._steps.pool, *self._steps.of_plan(spread.whole))
        if prepared.cache is not None:
            check_cache(prepared.cache, prepared.reasons)
        return prepared.cache

    def _spread(self, call: Callable[..., Any], given: dict[str, Any], spread: Spread, cut: ZigZag) -> Any:
        """The whole call's output, of which this rank computes its rows; the cache has those of all ranks afterwards."""
        check_model(self._model, given)
        part = Part(cut, spread.rank, spread.group, given.get("logits_to_keep") or 0)
        arguments, before, cache = part.arguments(given), self._backend.attended, self._prepare(given, spread)
        more = {} if cache is not None else without_rows(self._model)
        try:
            result = call(**{**arguments, **more})
            self._check_replaced(before)
            for layer in () if cache is None else cache.layers:
                layer.gather_late(lambda rows: gathered(rows, cut, spread.group))
        except BaseException:  # a rank's rows alone are no sequence
            for layer in () if cache is None else cache.layers:
                layer.drop_late()
            raise
        return part.joined(result)

    def _check_replaced(self, before: tuple[int, int]) -> None:
        """After a call: each attention was the policy's, or what it read is this rank's rows alone.

        Args:
            before: `Backend.attended` before the call.

        Raises:
            RuntimeError: one was not.
        """
        replaced, dense = (now - then for now, then in zip(self._backend.attended, before, strict=True))
        if dense or replaced < layers_of(self._model):
            why = dense_sites(self._backend) or "no graph had them"
            number = f"{replaced} of {layers_of(self._model)} attentions"
            raise RuntimeError(f"a prompt that is spread over ranks had {number} replaced, and all must be: {why}")


def spread_of(plan: Plan) -> Spread | None:
    """How the prompts of a plan are spread; None: they are not.

    Raises:
        ValueError: not all prefill policies are `ContextParallel` over one group.
        GroupError: this process is not in the group.
    """
    prefill = plan.prefill or DEFAULTS["prefill"]
    named = [prefill, *(rule.policy for rule in plan.rules if rule.phase == "prefill")]
    ours = [policy for policy in named if isinstance(policy, ContextParallel)]
    if not ours:
        return None
    if len(ours) < len(named) or len({policy.group for policy in ours}) > 1:
        raise ValueError("ContextParallel spreads a prompt over all layers: let every prefill policy be it, with one group")
    if any(entry.phase == "prefill" for entry in plan.reuse or ()):
        raise ValueError("ContextParallel selects in each layer: Plan.reuse must be of other phases")
    rules = tuple(rule._replace(policy=_inner(rule.policy)) for rule in plan.rules)
    group = ours[0].group_name
    return Spread(dataclasses.replace(plan, prefill=_inner(prefill), rules=rules), group, *rank_and_size(group))


def _inner(policy: Policy) -> Policy:
    return policy.inner if isinstance(policy, ContextParallel) else policy
