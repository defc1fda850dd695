"""A session: one model's compiled call, its backend and its report."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tsa_compile import first_call
from tsa_compile.backend import Backend
from tsa_compile.call_rows import is_decode_step, prompt_rows
from tsa_compile.context_calls import ContextCalls
from tsa_compile.default_decode import DefaultDecode, default_decode, model_device
from tsa_compile.dynamo import called, isolated, lengths_vary, room, settings, skips, traced_by_others
from tsa_compile.index_weights import attach_indexes, check_indexes, load_indexes
from tsa_compile.interface.front import front_of
from tsa_compile.model_state import ModelState
from tsa_compile.plan import Plan
from tsa_compile.prompt_masks import leave_to_the_model, make_beforehand
from tsa_compile.refuse_traces import RefuseTraces, refuse_to_be_traced
from tsa_compile.report import Report
from tsa_compile.speculation import Speculation
from tsa_compile.step_loop import StepLoop
from tsa_compile.steps import Steps

log = logging.getLogger("tsa_compile")
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class Session:
    """One model under a plan. `session(...)` is the compiled call; `attach` makes it the model's own, `detach` undoes that.

    A plan can be switched between calls, `session.plan = other`; nothing is traced anew.

    Args:
        model: any module; of a PEFT wrapper its base model is compiled, which the wrapper's generate() calls directly.
        plan: bound to the model here.
        compiler, inductor_options: as for `transform`.
        fullgraph: raise if the model's forward does not trace to one graph.
        any_length: one trace for all numbers of tokens, where it can be told which sizes these are; False: the first trace is for
            its own length alone, as PyTorch has it.

    Raises:
        ValueError: a rule of the plan matches no module; an unknown compiler.
        RuntimeError: the model is transformed by its attention interface.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        compiler: str = "eager",
        inductor_options: Mapping[str, Any] | None = None,
        fullgraph: bool = False,
        any_length: bool = True,
    ) -> None:
        model = called(model)
        if front_of(model) is not None:
            raise RuntimeError("the model is transformed by its attention interface; call tsa_compile.restore(model) before")
        self._indexes: tuple[str | None, Callable[[], None]] = (None, lambda: None)
        self._device, self._given = model_device(model), plan
        default = self._bound(plan, model)
        self.backend = Backend(default.plan, compiler, inductor_options, model)
        self._compiled: Callable[..., Any] = torch.compile(isolated(model), backend=self.backend, fullgraph=fullgraph)
        self._any_length = any_length
        self._room = room(model)
        self._lock = threading.Lock()
        self.steps = Steps(self.backend, ModelState(model, RefuseTraces))
        self.steps.default = default
        self.prompts = ContextCalls(self.backend, self.steps)
        self.calls = self.untraced = 0
        self.speculation: Speculation | None = None
        weakref.finalize(self, self.backend.close)

    @property
    def plan(self) -> Plan:
        return self.backend.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        model = self.backend.model
        self._given = plan
        if model is None:
            self.backend.plan = plan
            return
        self._device = model_device(model)
        default = self._bound(plan, model)
        self.backend.plan, self.steps.default = default.plan, default

    def follow_device(self) -> None:
        """The plan's decode policy is by default that for the device where the model is now."""
        model = self.backend.model
        if model is not None and self._given.where == "pays" and model_device(model) != self._device:
            self.plan = self._given

    def _bound(self, plan: Plan, model: nn.Module) -> DefaultDecode:
        """The plan for this model, whose learned indexes are the model's, with its default for decode steps."""
        if plan.weights not in (None, self._indexes[0]):
            self._indexes[1]()
            remove = attach_indexes(model, load_indexes(plan.weights))
            self._indexes = plan.weights, remove
            weakref.finalize(self, remove)
        bound = plan.bind(model)
        check_indexes(model, bound)
        return default_decode(bound, model)

    def close(self) -> None:
        """Let go of all graphs; the model's learned indexes go."""
        self._indexes[1]()
        self.backend.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call, compiled. From any thread, also while others compile."""
        before = self.backend.runs
        result = self.prompts.run(self._traced, args, kwargs)
        ran = self.backend.runs > before
        with self._lock:
            self.calls += 1
            self.untraced += not ran
            first = not ran and self.untraced == 1
        if first:
            self.backend.warn("a call ran without any compiled graph, dense: tsa_compile.report(model) counts them")
        return result

    def loop(self, loop: StepLoop, **kwargs: Any) -> Any | None:
        """`loop` over the compiled call, as one step of `loop.steps` tokens (`Steps.loop`)."""
        result = self.steps.loop(self._traced, kwargs, loop)
        if result is not None:
            with self._lock:
                self.calls += loop.steps
        return result

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Is it the model's own call: a decode step without a policy, or a prompt for which no policy pays?

        Where others trace the call, so are decode steps that have a policy by default alone.
        """
        if not is_decode_step(kwargs) and not torch.compiler.is_dynamo_compiling():
            self.follow_device()
        if not self.plan.decodes or (self.steps.by_default and traced_by_others()):
            return is_decode_step(kwargs) or self.does_not_pay(args, kwargs)
        if self.steps.by_default and self.does_not_pay(args, kwargs):
            self.steps.take_over(args, kwargs)
            return True
        return False

    def does_not_pay(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Is it a prompt that every attention that was traced would read all of? The model's own call does so sooner."""
        return self.plan.where == "pays" and 0 < prompt_rows(args, kwargs) < self.backend.pays_from()

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        if self._any_length:
            lengths_vary(args, kwargs)
        with settings.ours(self._room), skips.told_to(self._skipped):
            return self._compiled(*args, **kwargs)

    @property
    def report(self) -> Report:
        """What the plan does with what was traced so far."""
        report = self.backend.report
        report.calls, report.untraced, report.steps = self.calls, self.untraced, self.steps.counts()
        report.prompts, report.speculation = self.prompts.counts(), self.speculation
        report.decode = "" if self.steps.default is None else self.steps.default.said
        return report

    def speculated(self, seen: Speculation) -> None:
        """A speculative generation came to an end."""
        with self._lock:
            self.speculation = seen if self.speculation is None else self.speculation.plus(seen)

    def _skipped(self, message: str) -> None:
        self.backend.warn(f"{message}: further calls of that function run dense")


class Entry:
    """What a transformed model calls: the session's compiled call, or the model's own for decode steps without a policy."""

    def __init__(self, session: Session, model: nn.Module) -> None:
        self.session = session
        # Inductor is asked for all steps; the eager graph of such a step would be the model itself, behind guards.
        self._own = model._call_impl if session.backend.compiler == "eager" else session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An error where others trace it, as that would inline the dense model without a word; but for decode steps, which are
        dense anyway: `generate()` with a static cache compiles them by itself."""
        if self.session.leaves(args, kwargs):
            return self._own(*args, **kwargs)
        if traced_by_others():
            refuse_to_be_traced()
        two = None if args else first_call.parts(kwargs)
        if two is not None:
            return first_call.joined(self(**two[0]), self(**two[1]))
        return self.session(*args, **kwargs)


def attach(model: nn.Module, make: Callable[[], Session]) -> None:
    """From now on calls of the model are those of the session that `make` gives.

    Raises:
        RuntimeError: the model is compiled already.
    """
    model = called(model)
    if model._compiled_call_impl is not None:
        raise RuntimeError("the model is compiled already; call tsa_compile.restore(model) before transforming it again")
    model._compiled_call_impl = Entry(make(), model)
    _ATTACHED[model] = model.register_forward_pre_hook(RefuseTraces(), with_kwargs=True)
    leave_to_the_model(model)


def attached(model: nn.Module) -> Session | None:
    """The session whose calls the model's are; None: it has none.

    Raises:
        RuntimeError: it had one, and was compiled by something else since.
    """
    model = called(model)
    entry = model._compiled_call_impl
    if not isinstance(entry, Entry) and model in _ATTACHED:
        raise RuntimeError(
            f"{type(model).__name__} was transformed by tsa_compile, but something else (model.compile()?) has taken its calls "
            "since, which are dense now; tsa_compile.restore(model) forgets the transformation and leaves the other in place"
        )
    return entry.session if isinstance(entry, Entry) else None


def detach(model: nn.Module) -> bool:
    """The model's calls are its own again, and its graphs are freed; what something else has put in their place stays.

    Returns whether the model had a session.
    """
    model = called(model)
    entry = model._compiled_call_impl
    if isinstance(entry, Entry):
        model._compiled_call_impl = None
        entry.session.close()
    elif model in _ATTACHED:
        log.warning("%s was compiled by something else since it was transformed; that stays", type(model).__name__)
    hook = _ATTACHED.pop(model, None)
    if hook is not None:
        hook.remove()
        make_beforehand(model)
    return hook is not None
