"""What happened to each attention site: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from tsa_compile.rules import layer_number
from tsa_compile.speculation import Speculation

if TYPE_CHECKING:
    from rich.table import Table

    from tsa_compile.passes.context import Decision


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One attention site of one compiled graph."""

    graph: int
    layer: int
    module: str
    heads: str
    q_len: str
    k_len: str
    policy: str
    replaced: bool
    reason: str
    kept: float | None = None  # kept share of the tokens, or of the key blocks, in [0, 1]; None: not measured

    @classmethod
    def of(cls, graph: int, decision: Decision, module: str, fallen: str | None) -> SiteReport:
        """The entry of a decision; `fallen`: why its graph runs as it was after all."""
        s = decision.site
        reason = decision.reason or fallen
        return cls(
            graph=graph,
            layer=s.index if (n := layer_number(module)) is None else n,
            module=module,
            heads=f"{s.heads}/{s.kv_heads}",
            q_len=_size(s.q_len),
            k_len=_size(s.k_len),
            policy=decision.policy.name,
            replaced=reason is None,
            reason=reason or decision.note,
        )


def _size(n: Any) -> str:
    return str(n) if isinstance(n, int) else "any"


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did, over all graphs; `count` is what it returns, such as the sites that it replaced."""

    count: int = 0
    seconds: float = 0.0

    def plus(self, count: int, seconds: float) -> PassReport:
        return PassReport(self.count + count, self.seconds + seconds)


@dataclasses.dataclass
class Report:
    """All sites of all graphs that one model (or one backend) compiled, in the order of compilation.

    Args:
        sites: what happened to each.
        graphs: how many were compiled.
        warnings: what the log was told.
        calls: of a transformed model, decode steps left out.
        untraced: those of them in which no compiled graph ran.
        passes: how often each pass found or changed something, and its seconds, over all graphs and plans.
        steps: how decode steps ran, and how many; of a transformed model whose plan has a policy for them.
        prompts: how prompts ran, and how many; of a transformed model whose plan spreads them over a process group.
        speculation: what speculative generation came to; None: there was none.
        front: "trace", or "interface": a transformers model's own attention interface, without graphs.
        ranks: kept shares are of the heads of so many processes.
        decode: of a transformed model whose plan names no policy for decode steps: what they are by default, and why.
    """

    sites: list[SiteReport] = dataclasses.field(default_factory=list)
    graphs: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)
    calls: int = 0
    untraced: int = 0
    passes: dict[str, PassReport] = dataclasses.field(default_factory=dict)
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    prompts: dict[str, int] = dataclasses.field(default_factory=dict)
    speculation: Speculation | None = None
    front: str = "trace"
    ranks: int = 1
    decode: str = ""

    @property
    def replaced(self) -> list[SiteReport]:
        return [s for s in self.sites if s.replaced]

    @property
    def dense(self) -> list[SiteReport]:
        return [s for s in self.sites if not s.replaced]

    def joined(self, other: Report) -> Report:
        """This report and, after it, another."""
        moved = [dataclasses.replace(s, graph=s.graph + self.graphs) for s in other.sites]
        both = Report(self.sites + moved, self.graphs + other.graphs, self.warnings + other.warnings, self.calls + other.calls)
        both.passes = dict(self.passes)
        for name, p in other.passes.items():
            both.passes[name] = both.passes.get(name, PassReport()).plus(p.count, p.seconds)
        return both

    def with_kept(self, kept: list[float], ranks: int = 1) -> Report:
        """A copy whose replaced sites carry the kept share of their tokens or key blocks, given in order of execution.

        Args:
            kept: the shares.
            ranks: whose heads they are of.

        Raises:
            ValueError: not one number for each replaced site.
        """
        if len(kept) != len(self.replaced):
            raise ValueError(f"{len(kept)} kept shares for {len(self.replaced)} replaced sites")
        shares = iter(kept)
        sites = [dataclasses.replace(s, kept=next(shares)) if s.replaced else s for s in self.sites]
        return dataclasses.replace(self, sites=sites, warnings=list(self.warnings), ranks=ranks)

    def summary(self) -> str:
        if self.front == "interface":
            return (
                f"{len(self.replaced)} of {len(self.sites)} attention sites replaced by the attention interface, without a trace"
            )
        if not self.graphs and not self.calls:
            return (
                "nothing was traced yet: call the model (model(...) or generate(); model.forward(...) goes around the compiler, "
                "and so does generate() of an encoder-decoder around its encoder)"
            )
        if not self.graphs:
            return (
                f"called {self.calls} time(s), but nothing was traced: Dynamo skipped the model's forward (TORCH_LOGS=+dynamo "
                "says why), or is switched off (TORCH_COMPILE_DISABLE, torch.compiler.set_stance)"
            )
        skipped = f"; {self.untraced} of {self.calls} calls ran dense, without a graph" if self.untraced else ""
        return f"{len(self.replaced)} of {len(self.sites)} attention sites replaced in {self.graphs} graph(s){skipped}"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_table(self, title: str | None = None) -> Table:
        """A rich table: one row for each site."""
        from rich.table import Table

        table = Table(title=title or self.summary(), title_justify="left")
        for name in ("graph", "layer", "module", "heads q/kv", "Lq", "Lk", "attention", "kept", "reason"):
            numeric = name in ("graph", "layer", "Lq", "Lk", "kept")
            justify: Any = "right" if numeric else "left"
            table.add_column(name, justify=justify, no_wrap=numeric or name == "attention", overflow="fold")
        for s in self.sites:
            kept = "" if s.kept is None else f"{s.kept:.0%}"
            verdict = f"[green]{s.policy}[/]" if s.replaced else "[yellow]dense[/]"
            cells: list[Any] = [s.graph, s.layer, s.module, s.heads, s.q_len, s.k_len, verdict, kept, s.reason]
            table.add_row(*map(str, cells))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=150, no_color=True)
        with console.capture() as capture:
            console.print(self.to_table())
            for warning in self.warnings:
                console.print(f"warning: {warning}", markup=False)
            if self.ranks > 1:
                console.print(f"kept: of the heads of all {self.ranks} ranks", markup=False, highlight=False)
            if self.passes:
                ran = ", ".join(f"{name} {p.count} in {p.seconds:.2f} s" for name, p in self.passes.items())
                console.print(f"passes: {ran}", markup=False, highlight=False)
            if self.prompts:
                ran = ", ".join(f"{n} {how}" for how, n in self.prompts.items())
                console.print(f"prompts: {ran}", markup=False, highlight=False)
            if self.decode:
                console.print(f"decode: {self.decode}", markup=False, highlight=False)
            if self.speculation is not None:
                console.print(f"speculation: {self.speculation}", markup=False, highlight=False)
        return capture.get()
