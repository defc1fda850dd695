"""One graph that Dynamo traced, with a rewritten form for each set of policies that it was asked to run."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tsa_compile.dynamo import begins_at_root
from tsa_compile.owners import Witness, find_witness
from tsa_compile.passes.facts.names import value_of
from tsa_compile.policies.dense import Dense
from tsa_compile.recorder import running, selecting_modules
from tsa_compile.static_caches import WithStates
from tsa_compile.watched import Watched, module_tensors

if TYPE_CHECKING:
    from tsa_compile.backend import Backend
    from tsa_compile.passes.context import Decision, KeptCache
    from tsa_compile.passes.prove_mask.patterns import Pattern
    from tsa_compile.passes.site import AttentionSite
    from tsa_compile.plan import Plan
    from tsa_compile.policies.base import Policy

MAX_FORMS = 32  # of a graph; the one that ran longest ago is made anew when it is needed
UNTOLD = "the graph runs for several modules, and its inputs do not tell which; the plan has different policies for them"
MANY = "Plan.reuse: a graph that begins inside of the model may run for several layers, so its attentions select by themselves"
LATE = "the plan was switched, and its rewritten form assumes sizes that the traced graph does not"
CLOSED = (
    "Dynamo runs a graph of a model that was restored since: its limit of graphs for one function is reached, which modules with "
    "accelerate's hooks share. torch._dynamo.reset() makes room"
)
Owner = tuple[str | None, ...]  # the module of each site; None: it cannot be told


@dataclasses.dataclass
class Form:
    """A rewritten copy of the graph.

    Args:
        gm: the copy.
        decisions: of the passes, one for each site.
        warnings: of the passes.
        patterns: what the passes assume of the inputs that they read.
        selections: the module of each selection, in order of execution.
        caches: static caches among the inputs, for which the copy has further inputs.
        run: takes the graph's inputs; None until it is compiled.
        fallen: why the graph runs as it was, in place of the copy; None: it does not.
    """

    gm: fx.GraphModule
    decisions: list[Decision]
    warnings: list[str]
    patterns: dict[str, Pattern]
    selections: list[str]
    caches: list[KeptCache]
    run: Callable[..., Any] | None = None
    fallen: str | None = None


class TracedGraph:
    """Runs the form of a graph that the backend's plan asks for.

    Args:
        backend: has the plan, the compiler and the model.
        gm: the graph, which stays as it is.
        inputs: what Dynamo gives to backends: examples, among them the real weights.

    Attributes:
        sites: the attentions of the graph, as they were traced.
        traced_in: the modules of the sites when they were traced.
        owners: the modules of the sites at each call, where the graph may run for several; in the order they were seen.
    """

    def __init__(self, backend: Backend, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.gm, self._backend = gm, backend
        self._lock, self._closed = threading.RLock(), False
        self._inputs = gm.graph.find_nodes(op="placeholder")
        self._shapes = _shape_env(self._inputs)
        self._tensors = weakref.WeakValueDictionary(module_tensors(gm, inputs))
        self._context = torch._guards.TracingContext.try_get() if backend.compiler != "eager" else None
        self._forms: collections.OrderedDict[tuple[str, ...], Form] = collections.OrderedDict()
        self._chosen: dict[tuple[int, bool, Owner | None], tuple[Plan, Form]] = {}
        plan, drafting = backend.running
        first = self._rewrite(plan, plan.policy_for, drafting)
        self.sites = [d.site for d in first.decisions]
        self.traced_in: Owner = tuple(site.module for site in self.sites)
        self.owners: dict[Owner, None] = {}
        self._witnesses = self._find_witnesses(inputs)
        self._compile(first, inputs)
        self._forms[_key(plan, self._policies(plan, drafting, self.traced_in), drafting)] = first

    def run(self, *args: Any) -> Any:
        """What Dynamo calls. Not `__call__`: Dynamo wraps what it gets, and would copy all that an object holds."""
        if self._closed:
            raise RuntimeError(CLOSED)
        plan, drafting = self._backend.running
        owner = self._owner(args) if self.shared else None
        form = self.form(plan, drafting, owner)
        run = form.run or self._compile(form, [value_of(node) for node in self._inputs], late=True)
        self._backend.on_run(self, form)
        with running(self._backend.model, self._modules(form, owner)):
            return run(*args)

    def form(self, plan: Plan, drafting: bool = False, owner: Owner | None = None) -> Form:
        """The form that `plan` asks for.

        Args:
            plan: says the policies.
            drafting: decode steps are drafts.
            owner: None for the modules in which the graph was traced.
        """
        known = self._chosen.get((id(plan), drafting, owner))
        return known[1] if known is not None and known[0] is plan else self._choose(plan, drafting, owner)

    def forms_under(self, plan: Plan, drafting: bool) -> list[Form]:
        """Those that ran."""
        with self._lock:
            return [form for (_, drafted, _), (own, form) in self._chosen.items() if own is plan and drafted == drafting]

    @property
    def constants(self) -> dict[str, torch.Tensor]:
        """Tensors of modules among its inputs, by placeholder name, as far as they are still there."""
        return dict(self._tensors)

    @property
    def is_whole(self) -> bool:
        """Is it all of the model's call, without a break?"""
        reason = getattr(self.gm, "compile_subgraph_reason", None)
        return begins_at_root(self.gm) and reason is not None and not reason.graph_break

    @property
    def shared(self) -> bool:
        """Must each call look up which modules it is for?"""
        return self._witnesses is not None

    def close(self) -> None:
        """Let go of the graph and its forms: Dynamo keeps what a backend returned longer than the model needs it."""
        with self._lock:
            self._forms.clear()
            self._chosen.clear()
            self._inputs, self._context, self._shapes, self._closed = [], None, None, True
            self.gm = fx.GraphModule({}, fx.Graph())

    def _find_witnesses(self, inputs: Sequence[Any]) -> list[Witness | None] | None:
        """One for each site; None: the graph runs for the modules that it was traced in, and no others."""
        names = self._backend.names
        if names is None or begins_at_root(self.gm) or not self.sites:
            return None
        return [find_witness(site.module, self.gm, inputs, names) for site in self.sites]

    def _owner(self, args: Sequence[Any]) -> Owner:
        names = self._backend.names
        assert self._witnesses is not None
        assert names is not None
        owner = tuple(None if w is None else w.module(names.of(args[w.position])) for w in self._witnesses)
        self.owners.setdefault(owner)
        return owner

    def _modules(self, form: Form, owner: Owner | None) -> Sequence[str]:
        if owner is None:
            return form.selections
        now = {site.module: module or site.module for site, module in zip(self.sites, owner, strict=True)}
        return [now.get(module, module) for module in form.selections]

    def _policies(self, plan: Plan, drafting: bool, owner: Owner) -> list[Policy | None]:
        """The policy of each site; None: it cannot be told."""
        given = zip(self.sites, owner, strict=True)
        told = [(site, m if plan.rules else site.module) for site, m in given]
        return [None if m is None else plan.policy_at(m, phase_in(site.phase, drafting), site.index) for site, m in told]

    def _choose(self, plan: Plan, drafting: bool, owner: Owner | None) -> Form:
        with self._lock:
            policies = self._policies(plan, drafting, owner or self.traced_in)
            key = _key(plan, policies, drafting)
            if key not in self._forms:
                told = {s.index: p for s, p in zip(self.sites, policies, strict=True)}
                self._forms[key] = self._late_form(plan, told, drafting)
            form = self._forms[key]
            self._forms.move_to_end(key)
            self._chosen[id(plan), drafting, owner] = (plan, form)
            if len(self._forms) > MAX_FORMS:
                old = self._forms.popitem(last=False)[1]
                self._chosen = {k: v for k, v in self._chosen.items() if v[1] is not old}
            return form

    def _late_form(self, plan: Plan, policies: dict[int, Policy | None], drafting: bool) -> Form:
        """A form made after Dynamo took its guards: where it needs more of them, the graph runs as it was."""
        guards = _guards(self._shapes)
        form = self._rewrite(plan, lambda site: policies[site.index] or Dense(), drafting)
        for warning in form.warnings:
            self._backend.warn_once(warning)
        form.decisions = [dataclasses.replace(d, reason=UNTOLD) if policies[d.site.index] is None else d for d in form.decisions]
        if _guards(self._shapes) != guards:
            self._fall(form, LATE)
        return form

    def _rewrite(self, plan: Plan, policy_for: Callable[[AttentionSite], Policy], drafting: bool) -> Form:
        from tsa_compile.passes.pipeline import run_pipeline

        gm = fx.GraphModule(self.gm, copy.deepcopy(self.gm.graph))
        whole = begins_at_root(self.gm)
        route_for = plan.route_for if whole else (lambda site: None)
        result = run_pipeline(
            gm,
            policy_for,
            constants=self.constants,
            drafting=drafting,
            route_for=route_for,
            pays_from=plan.pays_from,
            keeps=True,
        )
        if plan.reuse and result.decisions and not whole:
            result.warnings.append(MANY)
        self._backend.passed(result)
        return Form(gm, result.decisions, result.warnings, result.patterns, selecting_modules(gm), result.caches)

    def _compile(self, form: Form, inputs: Sequence[Any], late: bool = False) -> Callable[..., Any]:
        with self._lock:
            if form.run is None:
                guards = _guards(self._shapes)
                run = self._compiled(form, inputs, late)
                if late and _guards(self._shapes) != guards:
                    self._fall(form, LATE)
                elif form.patterns:
                    form.run = Watched(run, self.gm, form.patterns, self._tensors, functools.partial(self._fall, form))
                else:
                    form.run = run
            assert form.run is not None
            return form.run

    def _compiled(self, form: Form, inputs: Sequence[Any], late: bool) -> Callable[..., Any]:
        """The form's graph, compiled, which takes the inputs of the traced one."""
        context = self._context if late else None
        if not form.caches:
            return self._backend.compile(form.gm, inputs, context)
        from tsa_compile.passes.keep_states import made_anew

        anew = made_anew(form.gm, form.caches)
        kept = [value_of(node) for cache in form.caches for node in cache.inputs.values()]
        run = self._backend.compile(form.gm, [*inputs, *kept], context)
        names = [node.name for node in self._inputs]
        return WithStates(run, anew.forward, form.caches, names, self._backend.own_buffers)

    def _fall(self, form: Form, reason: str) -> None:
        form.run, form.fallen, form.selections = self.gm.forward, reason, []
        self._backend.warn(reason)


def phase_in(phase: str, drafting: bool) -> str:
    """The phase of a traced site, which a session may have entered by a draft, in a call that is a draft or is not."""
    return {"decode": "draft"}.get(phase, phase) if drafting else {"draft": "decode"}.get(phase, phase)


def _key(plan: Plan, policies: Sequence[Policy | None], drafting: bool) -> tuple[str, ...]:
    return (str(drafting), plan.where, repr(plan.reuse), *map(repr, policies))


def _guards(shapes: ShapeEnv | None) -> int:
    return 0 if shapes is None else len(shapes.guards)


def _shape_env(inputs: Sequence[fx.Node]) -> ShapeEnv | None:
    """Where the symbolic sizes of a graph live."""
    fakes = (value_of(node) for node in inputs)
    return next((x.fake_mode.shape_env for x in fakes if isinstance(x, FakeTensor)), None)
