"""A session's calls and the model's cache: its layers become ours, and decode steps run on buffers that stay where they are."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tsa_compile.cache.entry import Prepared, prepare
from tsa_compile.cache.fixed import device_of, masked_in_full, pinned
from tsa_compile.cache.pinned import PinnableRows
from tsa_compile.cache.storage import Pool
from tsa_compile.call_rows import fix_rows, rows_of
from tsa_compile.cuda_graphs import Recording, Recordings
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
        self._tell(prepared)
        rows = rows_of(args, kwargs)
        verifies = 1 < rows <= VERIFY_ROWS and _verifies(plan) and _has_rows(prepared) and keeping is None
        if (rows != 1 and not verifies) or (keeping is not None and begins(prepared)):
            result = call(*args, **kwargs)
            if keeping is not None:
                settle(prepared)
            return result
        why = self._not_fixed(prepared, args, kwargs)
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
        if keeping is not None or self._not_fixed(prepared, (), kwargs) is not None:
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
                self._backend.replayed()
                return result
            self._count(FIXED, steps)
            runs = self._backend.runs
            result = step()
            recording.ready = not recording.refused and self._backend.replaced(runs, steps) > 0
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

    def _not_fixed(self, prepared: Prepared, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Why a decode step does not run on fixed buffers; None: it does."""
        model, mask = self._backend.model, kwargs.get("attention_mask")
        if -1 in prepared.reasons:
            return prepared.reasons[-1]
        if prepared.is_pair:
            return "the cache of an encoder-decoder"
        if not getattr(model, "_can_compile_fullgraph", False):  # transformers: it works with static caches
            return f"{type(model).__name__} does not say that it works with static caches"
        layers = [layer for layer in prepared.cache.layers if isinstance(layer, PinnableRows)]
        if not layers or not layers[0].count():
            return "no layer that keeps all rows, or no row"
        if not all(x.is_compileable for n, x in enumerate(prepared.cache.layers) if n not in prepared.ours):
            return "a layer of the cache that is not ours"
        if any(x.count() != layers[0].count() for x in layers):
            return "layers of several lengths"
        if layers[0].keeping is not None and len(set(map(device_of, layers))) > 1:
            return "layers on several devices, which keep their rows elsewhere too"
        if len(args) > 1 or (mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2)):
            return "a mask that is not [batch, tokens], or arguments without names"
        config = getattr(model, "config", None)
        if layers[0].lengths is not None and getattr(config, "_attn_implementation", None) != "sdpa":
            return "batch rows of different lengths, in an attention implementation that is not sdpa"
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            return "attention weights are asked for"
        return None

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
