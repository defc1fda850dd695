"""One model, one attention implementation, one scenario: dense, keeping every token, and sparse against references."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsa_compile.dynamo import isolated
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.token_sparse import Completion, TokenSparse
from tsa_compile.report import Report
from tsa_compile.session import Session
from tsa_compile.tools.zoo.entries import FLEX, NO_FAST_PATH, Entry, NotOffered
from tsa_compile.tools.zoo.result import CheckFailed, Result
from tsa_compile.tools.zoo.scenarios import Scenario
from tsa_compile.tools.zoo.sdpa_reference import reference_outputs

KEEP_ALL = TokenSparse.paper(coverage=0.0, window=1, pool=1, min_tokens=1, min_queries=0)
TOKENS = TokenSparse(coverage=0.4, window=4, pool=3, min_tokens=4, min_queries=0, completion=Completion(3, 2, 3))
BLOCKS = BlockSparse(alpha=0.99, pool=16, window=1, sinks=0, last_dense=0)  # the default's kind, strict enough for short prompts
TOLERANCE = 2e-4  # of the largest output, fp32
FEW = "queries over a cache: "  # reason of a site with too few rows for the policy, which it would take otherwise


def run_scenario(entry: Entry, implementation: str, scenario: Scenario) -> Result:
    """Run a scenario; failures are in the result, not raised."""
    result = Result(entry.name, entry.library, implementation, scenario.name)
    try:
        with torch.no_grad(), _fast_path(implementation != NO_FAST_PATH):
            _check(entry, implementation, scenario, result)
    except NotOffered as why:
        result.status, result.detail = "not offered", str(why)
    except CheckFailed as why:
        result.status, result.detail = "failed", str(why)
    except Exception as error:  # of any library
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(at.filename).name}:{at.lineno}"
        result.status, result.detail = "failed", f"{type(error).__name__} at {place}: {str(error)[:500]}"
    finally:
        torch._dynamo.reset()
    return result


def _check(entry: Entry, implementation: str, scenario: Scenario, result: Result) -> None:
    model = _build(entry, implementation)
    dense = _dense(entry, implementation, scenario)
    result.calls = len(dense)
    own = _own_graphs(model, scenario, entry) if scenario.counted else None
    session = Session(model, Plan(prefill=KEEP_ALL), any_length=False)  # graphs of one length, and of all
    sparse = {}
    with _compiled(model, session) as breaks:
        kept = scenario.run(model, entry)
        _describe(result, session.report)
        for policy in (TOKENS, BLOCKS) if scenario.sparse else ():
            session.plan = Plan(prefill=policy)
            sparse[policy] = scenario.run(model, entry), session.report
        result.breaks = breaks()
    result.error = difference(kept, dense)
    if own is not None and (result.graphs > own[0] or result.breaks > own[1]):
        seen = f"{result.graphs} graphs and {result.breaks} graph breaks"
        raise CheckFailed(f"{seen}, where the model alone gives {own[0]} and {own[1]}")
    expected = 0 if implementation == FLEX else entry.causal * scenario.prefills
    _check_sites(result, expected)
    if result.error > TOLERANCE:
        raise CheckFailed(f"at coverage 0 the output differs from dense by {result.error:.1e} of its size")
    for policy, (outputs, report) in sparse.items():
        taken = [s.replaced or FEW in s.reason for s in report.sites]
        if sum(taken) != expected:
            raise CheckFailed(f"{policy.name} takes {sum(taken)} of {len(taken)} sites, expected {expected}")
        reference = reference_outputs(policy, _build(entry, "sdpa"), entry, scenario, taken) if expected else dense
        result.sparse_errors[policy.name] = difference(outputs, reference)
        moved = difference(outputs, dense) if expected and (policy is TOKENS or scenario.long) else None
        _check_sparse(policy, result.sparse_errors[policy.name], moved)


def _dense(entry: Entry, implementation: str, scenario: Scenario) -> list[Tensor]:
    """What the model gives uncompiled. Flex attention would compile itself, for minutes on a CPU: SDPA says the same."""
    model = _build(entry, "sdpa" if implementation == FLEX else implementation)
    try:
        return scenario.run(model, entry)
    except NotOffered:
        raise
    except Exception as error:  # of any library
        raise NotOffered(f"the model itself fails: {type(error).__name__}: {str(error)[:200]}") from error


def _build(entry: Entry, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    return entry.build(implementation)


def _describe(result: Result, report: Report) -> None:
    result.sites, result.replaced, result.graphs = len(report.sites), len(report.replaced), report.graphs
    result.reasons = dict(Counter(s.reason for s in report.dense))
    result.warnings = sorted(set(report.warnings))


def _own_graphs(model: nn.Module, scenario: Scenario, entry: Entry) -> tuple[int, int]:
    """Graphs and graph breaks of the model compiled without us."""
    graphs = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    with _compiled(model, torch.compile(isolated(model), backend=keep)) as breaks:
        scenario.run(model, entry)
        return len(graphs), breaks()


def _check_sites(result: Result, expected: int) -> None:
    if not (result.sites or result.warnings):
        raise CheckFailed("no attention found, and no warning")
    if result.replaced != expected:
        raise CheckFailed(f"{result.replaced} of {result.sites} sites replaced, expected {expected}: {result.reasons}")


def _check_sparse(policy: Policy, error: float, moved: float | None) -> None:
    """`moved`: the difference from dense, where there must be one."""
    if error > TOLERANCE:
        raise CheckFailed(f"with {policy.name} the output differs from the reference by {error:.1e} of its size")
    if moved is not None and moved < 5 * TOLERANCE:
        raise CheckFailed(f"with {policy.name} the output is dense: {moved:.1e}")


@contextlib.contextmanager
def _fast_path(enabled: bool) -> Iterator[None]:
    """May `nn.MultiheadAttention` take its fused operator, in which no attention can be seen?"""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest absolute difference over the largest value (at least 1); infinite where shapes differ or numbers are not finite."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    worst = [((x - y).abs().max() / y.abs().max().clamp(min=1)).item() for x, y in zip(a, b, strict=True) if x.numel()]
    return max((x if x == x else float("inf") for x in worst), default=0.0)


def _breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@contextlib.contextmanager
def _compiled(model: nn.Module, call: Callable[..., Any]) -> Iterator[Callable[[], int]]:
    """Calls of `model` are those of `call`, which compiles, from a fresh start; yields a count of graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model._compiled_call_impl = call
    try:
        yield _breaks
    finally:
        model._compiled_call_impl = None
