"""A session's calls and the model's cache: its layers become ours, and decode steps run on buffers that stay where they are."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tsa_compile.cache.entry import Prepared, prepare
from tsa_compile.cache.fixed import device_of, masked_in_full, pinned
from tsa_compile.cache.pinned import PinnableRows
from tsa_compile.cache.storage import Pool
from tsa_compile.call_rows import fix_rows, rows_of
from tsa_compile.cuda_graphs import Recording, Recordings
from tsa_compile.default_decode import OWN, DefaultDecode
from tsa_compile.fixed_steps import why_not_fixed, why_own_step
from tsa_compile.partial_steps import begins, check_layers, check_replaced, keeping_of, settle, with_positions
from tsa_compile.passes.site import VERIFY_ROWS
from tsa_compile.plan_states import Kinds, states_for
from tsa_compile.policies.dense import Dense
from tsa_compile.step_loop import StepLoop

if TYPE_CHECKING:
    from tsa_compile.backend import Backend
    from tsa_compile.model_state import ModelState
    from tsa_compile.plan import Plan

FIXED = "in one graph, on fixed buffers"
REPLAYED = "replayed"
_SILENT = ("the call has no transformers cache", "gradients are enabled")  # nothing to tell the user


class Steps:
    """What is done around each call of a session whose plan has a policy for decode steps. Verify steps count as such.

    Args:
        backend: the session's.
        model_state: of its model.
    """

    recorded_on: frozenset[str] = frozenset({"cuda"})  # kinds of device; elsewhere a replay would be the same call again

    def __init__(self, backend: Backend, model_state: ModelState) -> None:
        self.pool = Pool()
        self._backend = backend
        self._model_state = model_state
        self.recordings = Recordings()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()  # caches of the requests for which the model was looked over
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._told: set[str] = set()
        self._known_plan: tuple[Plan, Callable[[int], Kinds], Any] | None = None
        self.default: DefaultDecode | None = None  # what decode steps are by default
        self._not_recorded: weakref.WeakSet[Any] = weakref.WeakSet()  # caches whose steps were not, by default the model's own

    def counts(self) -> dict[str, int]:
        """How decode steps ran, and how many."""
        with self._lock:
            return dict(self._counts)

    def run(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`call(*args, **kwargs)`, the session's compiled call."""
        plan = self._backend.plan
        if not plan.decodes:
            return call(*args, **kwargs)
        states, keeping = self.of_plan(plan)
        prepared = prepare(args, kwargs, self.pool, states, keeping)
        rows = rows_of(args, kwargs)
        if self.by_default and rows == 1 and (own := self._why_own(prepared, args, kwargs)) is not None:
            return self._own_step(own, args, kwargs)
        if not self.by_default:
            self._tell(prepared)
        verifies = 1 < rows <= VERIFY_ROWS and _verifies(plan) and _has_rows(prepared) and keeping is None
        if (rows != 1 and not verifies) or (keeping is not None and begins(prepared)):
            result = call(*args, **kwargs)
            if keeping is not None:
                settle(prepared)
            return result
        why = why_not_fixed(self._backend.model, prepared, args, kwargs)
        check_layers(prepared, keeping, why)
        if why is not None:
            self._count(why)
            return call(*args, **kwargs)
        runs = self._backend.runs
        given = {**self.named(args), **kwargs}
        if keeping is not None:
            given = with_positions(self._backend.model, given, prepared.cache)
        result = self._on_buffers(call, given, prepared, rows, None)
        if keeping is not None:
            check_replaced(self._backend, runs, sum(isinstance(layer, PinnableRows) for layer in prepared.cache.layers))
        return result

    @property
    def by_default(self) -> bool:
        """Are this thread's decode steps `Exact` by default? Then all that it does not pay for is the model's own."""
        return self.default is not None and self.default.pays_from is not None and self.default.plan is self._backend.plan

    def take_over(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before a prompt that is the model's own call: its cache becomes ours, for the steps behind it."""
        prepare(args, kwargs, self.pool, *self.of_plan(self._backend.plan))

    def _why_own(self, prepared: Prepared, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Why a step is the model's own by default; None: it is not."""
        if self._backend.compiler != "eager":
            return None  # Inductor is asked for all steps
        if prepared.cache is not None and prepared.cache in self._not_recorded:
            return "could not be recorded"
        why = why_not_fixed(self._backend.model, prepared, args, kwargs)
        if why is None and self._model_state.is_hooked():
            why = "a forward hook"
        assert self.default is not None
        assert self.default.pays_from is not None
        return why or why_own_step(prepared.cache.layers, self.recorded_on, self.default.pays_from)

    def _own_step(self, why: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        model = self._backend.model
        assert model is not None
        self._count(f"{OWN}: {why}")
        self._backend.passed_by()
        return model._call_impl(*args, **kwargs)

    def loop(self, call: Callable[..., Any], kwargs: Mapping[str, Any], loop: StepLoop) -> Any | None:
        """`loop(call, advance, **kwargs)`: all its steps as if they were one; None: they do not run on fixed buffers.

        Args:
            kwargs: arguments of a step of one token; those of the further ones are `loop`'s affair, but for the mask's.
        """
        plan = self._backend.plan
        if not plan.decodes:
            return None
        states, keeping = self.of_plan(plan)
        prepared = prepare((), kwargs, self.pool, states, keeping)
        self._tell(prepared)
        if keeping is not None or why_not_fixed(self._backend.model, prepared, (), kwargs) is not None:
            return None
        layers = prepared.cache.layers
        if not all(isinstance(layer, PinnableRows) for layer in layers) or len(set(map(device_of, layers))) > 1:
            return None  # a window's rows are put in place between two calls, and places of other devices do not advance
        return self._on_buffers(call, kwargs, prepared, 1, loop)

    def _on_buffers(
        self, call: Callable[..., Any], given: Mapping[str, Any], prepared: Prepared, rows: int, loop: StepLoop | None
    ) -> Any:
        """A step of `rows` rows on fixed buffers, or all those of a loop."""
        layers = [layer for layer in prepared.cache.layers if isinstance(layer, PinnableRows)]
        ours, steps = [prepared.cache.layers[n] for n in prepared.ours], 1 if loop is None else loop.steps
        with layers[0].around_step(layers) as anew, masked_in_full(ours), pinned(layers, given, rows, steps) as fixed:
            if loop is not None:
                assert layers[0].pinned is not None
                call = functools.partial(loop, call, layers[0].pinned.advance)
            result = self._step(call, fixed, prepared.cache, rows, anew, loop)
        for layer in layers:
            layer.advance(rows * steps)
        return result

    def of_plan(self, plan: Plan) -> tuple[Callable[[int], Kinds], Any]:
        """`states_for` and `keeping_of`, the same objects for the same plan."""
        if self._known_plan is None or self._known_plan[0] is not plan:
            self._known_plan = (plan, states_for(plan, self._backend.model), keeping_of(plan, self._backend.model))
        return self._known_plan[1:]

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """The call's first argument, by its name."""
        if not args:
            return {}
        model = self._backend.model
        assert model is not None
        return {next(iter(inspect.signature(model.forward).parameters)): args[0]}

    def _step(
        self, call: Callable[..., Any], kwargs: Mapping[str, Any], cache: Any, rows: int, anew: bool, loop: StepLoop | None
    ) -> Any:
        """One step on fixed buffers: a replay, or the call, after which the next one may be recorded; `anew`: the call alone."""
        recording = None if anew else self._recording(kwargs, cache, None if loop is None else loop.key)
        steps = 1 if loop is None else loop.steps
        for tensor in {**kwargs, **({} if recording is None else recording.inputs)}.values():
            fix_rows(tensor, rows)
        if recording is None:
            self._not_recorded.add(cache)
            self._count(FIXED, steps)
            return call(**kwargs)
        with recording.lock:
            recording.fill(kwargs)
            step = functools.partial(call, **{**kwargs, **recording.inputs})
            if recording.ready and recording.replay is None:
                self._record(recording, step, cache)
            if recording.replay is not None:
                self._count(REPLAYED, steps)
                with self._backend.uncounted():
                    result = recording.replay(step, cache)
                self._backend.passed_by()
                return result
            self._count(FIXED, steps)
            runs = self._backend.runs
            result = step()
            recording.ready = not recording.refused and self._backend.replaced(runs, steps) > 0
            if not recording.ready:
                self._not_recorded.add(cache)
        return result

    def _record(self, recording: Recording, step: Callable[[], Any], cache: Any) -> None:
        try:
            with self._backend.uncounted():
                recording.record(step, cache)
        except RuntimeError as error:
            recording.ready, recording.refused = False, True
            self._backend.warn(f"decode steps are not replayed, but run one by one: {error}")

    def _recording(self, kwargs: Mapping[str, Any], cache: Any, kind: Hashable) -> Recording | None:
        """Where this step is recorded; None: it is not to be. `kind`: of a loop."""
        if not all(isinstance(layer, PinnableRows) for layer in cache.layers):
            return None
        devices = set(map(device_of, cache.layers))
        if len(devices) > 1 or devices.pop().type not in self.recorded_on:
            return None
        if cache not in self._known:
            self._known.add(cache)
            assert self._backend.model is not None
            self._model_state.look(self._backend.model)
        if self._model_state.is_hooked():
            return None
        fixed = {n: x for n, x in kwargs.items() if not cache.layers[0].pinned.holds(x)}
        return self.recordings.find(
            cache.layers, fixed, cache, self._backend.running, self._model_state.read(), (kind, cache.layers[0].mode())
        )

    def _count(self, how: str, steps: int = 1) -> None:
        with self._lock:
            self._counts[how] += steps

    def _tell(self, prepared: Prepared) -> None:
        """Once for each reason, to the log and the report."""
        with self._lock:
            new = {r for r in prepared.reasons.values() if not r.startswith(_SILENT)} - self._told
            self._told |= new
        for reason in sorted(new):
            self._backend.warn(f"the cache, or a layer of it, stays as it is: {reason}")


def _has_rows(prepared: Prepared) -> bool:
    return any(prepared.cache.layers[n].count() for n in prepared.ours)


def _verifies(plan: Plan) -> bool:
    """Does the plan name a policy for verify steps?"""
    named = [plan.verify, *(rule.policy for rule in plan.rules if rule.phase == "verify")]
    return any(policy is not None and not isinstance(policy, Dense) for policy in named)
