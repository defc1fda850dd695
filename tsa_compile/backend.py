"""The torch.compile backend: graphs go through `passes.pipeline` and then to Inductor, or run as they are.

One `Backend` serves all: `transform`, `torch.compile(model, backend="tsa", options={...})`, calibration, evaluation and the zoo.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from tsa_compile.cache.own_buffers import OwnBuffers
from tsa_compile.owners import WeightNames, name_modules
from tsa_compile.plan import Plan
from tsa_compile.policies.base import own_edges
from tsa_compile.report import PassReport, Report, SiteReport
from tsa_compile.traced import Form, Owner, TracedGraph

if TYPE_CHECKING:
    from tsa_compile.kernels.edges import Edges
    from tsa_compile.passes.context import Decision, PipelineResult
    from tsa_compile.passes.site import AttentionSite

log = logging.getLogger("tsa_compile")
COMPILERS = ("inductor", "eager")
EXPECTED = ("policy is Dense", "decode step", "verify step")  # reasons that nobody has to be warned of


class Backend:
    """A callable for `torch.compile(backend=...)` that applies a plan and says what it did.

    `backend.plan = other` holds from the next call on, without a trace: graphs are kept as they came, and each gets a rewritten
    form for the policies that the plan has for it.

    Args:
        plan: what runs.
        compiler: "inductor", or "eager" to run the rewritten graphs as they are.
        inductor_options: Inductor configuration for this backend only, such as {"max_autotune": True}.
        model: names the modules, also in graphs that begin inside it, as after a graph break, or that run for several layers.

    Raises:
        ValueError: unknown compiler, or options for a compiler that takes none.
    """

    def __init__(
        self,
        plan: Plan,
        compiler: str = "inductor",
        inductor_options: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        if compiler not in COMPILERS:
            raise ValueError(f"compiler must be one of {COMPILERS}, got {compiler!r}")
        if compiler == "eager" and inductor_options:
            raise ValueError(f"compiler='eager' takes no Inductor options, got {sorted(inductor_options)}")
        self._plan = plan
        self.compiler = compiler
        self.inductor_options = dict(inductor_options or {})
        self.graphs: list[TracedGraph] = []
        self.warnings: list[str] = []
        self.names = None if model is None else WeightNames(model)
        self.passes: dict[str, PassReport] = {}
        self.own_buffers = OwnBuffers()
        self._thread = threading.local()
        self._model: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        return self._model()

    @property
    def plan(self) -> Plan:
        """What runs, in this thread."""
        return self.running[0]

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan

    @property
    def running(self) -> tuple[Plan, bool]:
        """What this thread's calls run: a plan, and whether one token over a cache is a draft."""
        running: tuple[Plan, bool] | None = getattr(self._thread, "running", None)
        return (self._plan, False) if running is None else running

    @contextlib.contextmanager
    def under(self, plan: Plan, drafting: bool = False) -> Iterator[None]:
        """Inside, this thread's calls run under another plan; `drafting`: those of one token by its policies for drafts."""
        thread = self._thread
        before = getattr(thread, "running", None)
        thread.running = plan, drafting
        try:
            yield
        finally:
            thread.running = before

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        name_modules(gm, self.model)
        graph = TracedGraph(self, gm, example_inputs)
        self.graphs.append(graph)
        form = graph.form(*self.running)
        for warning in form.warnings:
            self.warn_once(warning)
        reasons = {d.reason or "" for d in form.decisions}
        unexpected = sorted(r for r in reasons if not r.startswith(EXPECTED))
        if unexpected and "" not in reasons:
            log.warning("none of the %d attention sites of a graph is replaced: %s", len(form.decisions), "; ".join(unexpected))
        return graph.run

    def warn(self, text: str) -> None:
        """To the log and the report."""
        self.warnings.append(text)
        log.warning(text)

    def warn_once(self, text: str) -> None:
        """As `warn`, unless the report has it already."""
        if text not in self.warnings:
            self.warn(text)

    def on_run(self, graph: TracedGraph, form: Form) -> None:
        """A graph is about to run."""
        self._thread.runs = self.runs + 1
        self._thread.last = graph, form
        replaced, dense = self.attended
        own = 0 if form.fallen else sum(d.reason is None for d in form.decisions)
        self._thread.attended = replaced + own, dense + len(form.decisions) - own

    @property
    def attended(self) -> tuple[int, int]:
        """How many attentions ran in this thread's graphs: those that were replaced, and the others."""
        counts: tuple[int, int] = getattr(self._thread, "attended", (0, 0))
        return counts

    def replaced(self, runs: int, calls: int = 1) -> int:
        """How many attentions were replaced, if since this thread had run `runs` graphs one alone ran for each of `calls` whole
        calls, with every attention replaced; 0 otherwise."""
        if self.runs != runs + calls:
            return 0
        graph, form = self._thread.last
        whole = all(d.reason is None for d in form.decisions) and form.fallen is None and graph.is_whole
        return len(form.decisions) if whole else 0

    def passed_by(self) -> None:
        """Something ran that does not come by: a recorded graph, or a decode step that is the model's own."""
        self._thread.runs = self.runs + 1

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, graphs that this thread runs are none of its runs: recording a step, and replaying it, are one run in all."""
        runs = self.runs
        try:
            yield
        finally:
            self._thread.runs = runs

    @property
    def runs(self) -> int:
        """How many graphs ran in this thread."""
        return getattr(self._thread, "runs", 0)

    def why_dense_drafts(self, plan: Plan) -> list[str | None]:
        """Of each attention of the graphs that ran as drafts under `plan`: why it reads every key; None: its policy took it."""
        forms = [form for graph in self.graphs for form in graph.forms_under(plan, drafting=True)]
        return [form.fallen or decision.reason for form in forms for decision in form.decisions]

    def pays_from(self) -> int:
        """Keys below which every attention of prompts that was traced is dense under the plan, as it does not pay; 0: there
        are none."""
        forms = [form for graph in self.graphs for form in graph.forms_under(self.plan, drafting=False)]
        prompts = [d for form in forms for d in form.decisions if d.reason is None and d.site.phase == "prefill"]
        return min((d.site.dense_below for d in prompts), default=0)

    @property
    def report(self) -> Report:
        """What the current plan does with the graphs traced so far."""
        hole = self._hole()
        warnings = [*self.warnings, *([] if hole is None else [hole])]
        return Report(self.sites(), len(self.graphs), warnings, passes=dict(self.passes))

    def passed(self, result: PipelineResult) -> None:
        """The passes went over a graph."""
        for name, count in result.counts.items():
            self.passes[name] = self.passes.get(name, PassReport()).plus(count, result.seconds[name])

    def sites(self) -> list[SiteReport]:
        """One entry for each site of each graph, and for each module that it ran for."""
        return [SiteReport.of(n, decision, module, form.fallen) for n, form, decision, module in self._decided()]

    def attentions(self) -> list[tuple[AttentionSite, str]]:
        """Each attention that was traced, and its module's path, in order of execution."""
        return [(decision.site, module) for _, _, decision, module in self._decided()]

    def _decided(self) -> Iterator[tuple[int, Form, Decision, str]]:
        """(graph, its form, decision, module) of each site and each module that it ran for."""
        for number, graph in enumerate(self.graphs):
            owners: list[Owner | None] = [*graph.owners] if graph.owners else [None]
            for owner in owners:
                form = graph.form(self.plan, owner=owner)
                for decision, module in zip(form.decisions, owner or graph.traced_in, strict=True):
                    yield number, form, decision, module or decision.site.module

    def _hole(self) -> str | None:
        """What the report says if the plan never lets some token of a prompt depend on the one before it, at any depth."""
        from tsa_compile.passes.check_reach import warning_of

        edges: dict[str | int, Edges] = {}
        for n, (_, form, decision, module) in enumerate(self._decided()):
            site = decision.site
            if site.phase != "prefill":
                continue
            if not site.mask.causal:
                return None  # of what is not causal, or not proven, nothing is said
            own = decision.reason is not None or form.fallen is not None
            edges[module or n] = own_edges(site) if own else decision.policy.guaranteed(site)
        return warning_of([*edges.values()])

    def close(self) -> None:
        """Let go of all graphs."""
        for graph in self.graphs:
            graph.close()
        self.own_buffers = OwnBuffers()
        self.graphs, self._thread = [], threading.local()  # a thread holds the form that it ran last

    def compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], context: torch._guards.TracingContext | None
    ) -> Callable[..., Any]:
        """Compile a rewritten graph; `context`: the trace it is from, where that is over."""
        if self.compiler == "eager":
            return gm.forward
        if context is not None:
            with torch._guards.tracing(context):
                return self.compile(gm, inputs, None)
        from torch._dynamo.convert_frame import compile_lock
        from torch._inductor.compile_fx import compile_fx

        from tsa_compile.passes.pipeline import pipeline_identity
        from tsa_compile.passes.share_rotary import share_rotary

        if share_rotary(gm.graph):
            gm.recompile()
        # The compile caches do not see what an operator's fake does: its source joins the user's own tag.
        tag = f"{torch.compiler.config.cache_key_tag}|tsa:{pipeline_identity(self.plan.to_dict())}"
        # One thread at a time, as Dynamo's own compilations are: before torch 2.13 the tag is one for the whole process.
        with compile_lock, torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=self.inductor_options or None))
