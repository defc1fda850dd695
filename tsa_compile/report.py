"""What happened to each attention site: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from tsa_compile.passes.context import PipelineResult


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
    kept: float | None = None  # kept share of the tokens, in [0, 1]; None: not measured


@dataclasses.dataclass
class Report:
    """All sites of all graphs that one model (or one backend) compiled, in the order of compilation."""

    sites: list[SiteReport] = dataclasses.field(default_factory=list)
    graphs: int = 0
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def replaced(self) -> list[SiteReport]:
        return [s for s in self.sites if s.replaced]

    @property
    def dense(self) -> list[SiteReport]:
        return [s for s in self.sites if not s.replaced]

    def add(self, result: PipelineResult) -> None:
        """Append the sites of one graph."""
        for d in result.decisions:
            s = d.site
            self.sites.append(
                SiteReport(
                    graph=self.graphs,
                    layer=s.layer,
                    module=s.module,
                    heads=f"{s.heads}/{s.kv_heads}",
                    q_len=str(s.q_len),
                    k_len=str(s.k_len),
                    policy=d.policy.name,
                    replaced=d.reason is None,
                    reason=d.reason or "",
                )
            )
        self.warnings.extend(result.warnings)
        self.graphs += 1

    def fall_back(self, graph: int, reason: str) -> None:
        """From now on no site of this graph is replaced."""
        fallen = lambda s: dataclasses.replace(s, replaced=False, reason=reason)  # noqa: E731
        self.sites = [fallen(s) if s.graph == graph and s.replaced else s for s in self.sites]
        self.warnings.append(reason)

    def with_kept(self, kept: list[float]) -> Report:
        """A copy whose replaced sites carry the kept share of their tokens, given in order of execution.

        Raises:
            ValueError: not one number for each replaced site.
        """
        if len(kept) != len(self.replaced):
            raise ValueError(f"{len(kept)} kept shares for {len(self.replaced)} replaced sites")
        shares = iter(kept)
        sites = [dataclasses.replace(s, kept=next(shares)) if s.replaced else s for s in self.sites]
        return Report(sites, self.graphs, list(self.warnings))

    def summary(self) -> str:
        if not self.graphs:
            return (
                "nothing was traced yet: call the model (model(...) or generate(); model.forward(...) goes around the compiler)"
            )
        return f"{len(self.replaced)} of {len(self.sites)} attention sites replaced in {self.graphs} graph(s)"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def to_table(self, title: str | None = None) -> Table:
        """A rich table: one row for each site."""
        from rich.table import Table

        table = Table(title=title or self.summary(), title_justify="left")
        for name in ("graph", "layer", "module", "heads q/kv", "Lq", "Lk", "attention", "kept", "reason"):
            numeric = name in ("graph", "layer", "Lq", "Lk", "kept")
            table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric or name == "attention")
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
        return capture.get()
