"""The zoo's results as JSON and as the support table of docs/models.md."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsa_compile.tools.zoo.all_entries import LIBRARIES, missing, version
from tsa_compile.tools.zoo.check_model import TOLERANCE
from tsa_compile.tools.zoo.result import NOT_RUN, Result

_HEAD = f"""# Models

Written by `tsa-compile zoo --markdown docs/models.md`; do not edit. Tiny random models in fp32 on the CPU, each with every
attention implementation that it offers:

- decoders: prefill, prefill with a dynamic and a static cache, prefill in chunks, decode, a batch padded on the left or on the
  right, sequences packed by position ids, `generate()`; prefill and left padding with two lengths, the second symbolic;
- encoders: a call, padded on either side; encoder-decoders: a call and `generate()`; all others: a call;
- flex attention: the first of these only, as it stays dense.

A scenario passes if no graph and no graph break is added to the model's own, the expected sites are replaced, the output at
coverage 0 is the dense one, and the outputs by `TokenSparse` and by `BlockSparse`, the default, set to leave keys out of short
prompts too, are those of an eager run by the same policy (all to {TOLERANCE:.0e} of the largest output). *Sites* and *replaced*
count one prefill. Decode steps stay dense in every model, and so do packed sequences, whose mask is data. What a model itself
cannot do (packed sequences, or a cache that fails uncompiled) does not count; "not offered" is an implementation that it has not.
"""
Run = tuple[dict[str, str], list[Result]]  # environment, results
_NODE = re.compile(r": \w+ \(\w+\)$")  # the name of a node in one graph


def environment() -> dict[str, str]:
    """Versions of the libraries that are here, and of Python."""
    here = {library: version(library).partition(" ")[2] for library in LIBRARIES if missing(library) is None}
    return {"python": platform.python_version(), **here}


def write_json(path: str, results: Sequence[Result]) -> None:
    data = {"environment": environment(), "results": [dataclasses.asdict(r) for r in results]}
    Path(path).write_text(json.dumps(data, indent=1) + "\n")


def read_json(path: str) -> Run:
    """(environment, results) of a file that `write_json` wrote.

    Raises:
        ValueError: it is not such a file.
    """
    data = json.loads(Path(path).read_text())
    if not isinstance(data, dict) or set(data) != {"environment", "results"}:
        raise ValueError(f"{path} was not written by tsa-compile zoo --json")
    return data["environment"], [Result(**r) for r in data["results"]]


def joined(runs: Sequence[Run]) -> list[Run]:
    """Runs of one environment as one, a later result of a scenario in place of an earlier one."""
    environments: list[dict[str, str]] = []
    merged: list[dict[tuple[str, ...], Result]] = []
    for env, results in runs:
        if env not in environments:
            environments.append(env)
            merged.append({})
        merged[environments.index(env)].update({(r.library, r.model, r.implementation, r.scenario): r for r in results})
    return [(env, list(part.values())) for env, part in zip(environments, merged, strict=True)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation of one model in one environment."""

    library: str
    model: str
    implementation: str
    sites: str
    replaced: str
    why: str
    passed: str
    failures: tuple[str, ...]


def summarise(results: Sequence[Result]) -> list[Row]:
    """A row for each model and implementation."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        groups.setdefault((r.library, r.model, r.implementation), []).append(r)
    return [_row(key, group) for key, group in groups.items()]


def _row(key: tuple[str, str, str], group: list[Result]) -> Row:
    first = group[0]
    if first.status in ("not offered", NOT_RUN):
        return Row(*key, "", "", first.detail if first.status == NOT_RUN else "", first.status, ())
    run = [r for r in group if r.status != "not offered"]
    passed = sum(r.status == "ok" for r in run)
    failures = tuple(f"{r.model}, {r.implementation}, {r.scenario}: {r.detail}" for r in run if r.status == "failed")
    calls = max(first.calls, 1)
    unread = [] if first.sites else [_unread(w) for w in first.warnings]
    why = dict.fromkeys([*(_NODE.sub("", x) for x in first.reasons), *unread])
    return Row(*key, str(first.sites // calls), str(first.replaced // calls), "; ".join(why), f"{passed} of {len(run)}", failures)


def _unread(warning: str) -> str:
    """What was not recognised, without its place in the model; the first of several."""
    what = re.match(r"\d+ attention-like .*?: (.*?)(;|$)", warning)
    return warning if what is None else "not recognised: " + what[1].rpartition(": ")[2]


def markdown(runs: Sequence[Run]) -> str:
    """docs/models.md for one or several environments."""
    tables = [summarise(results) for _, results in runs]
    ran = {(r.library, r.model) for rows in tables for r in rows if r.passed != NOT_RUN}
    tables = [[r for r in rows if r.passed != NOT_RUN or (r.library, r.model) not in ran] for rows in tables]
    lines = [_HEAD]
    for n, ((env, _), rows) in enumerate(zip(runs, tables, strict=True), 1):
        used = {"python", "torch", *(r.library for r in rows if r.passed != NOT_RUN)}
        lines.append(f"Run {n}: " + ", ".join(f"{name} {v}" for name, v in env.items() if name in used) + ".\n")
    for library in LIBRARIES:
        rows_of_it = {n: part for n, rows in enumerate(tables, 1) if (part := [r for r in rows if r.library == library])}
        if rows_of_it:
            lines += [f"## {library}\n", *_library_table(rows_of_it)]
    failures = [f for rows in tables for r in rows for f in r.failures]
    lines += ["## Failures\n", *([f"- {_cell(f)}" for f in failures] or ["None."])]
    return "\n".join(lines) + "\n"


def _library_table(runs: Mapping[int, Sequence[Row]]) -> list[str]:
    """Rows of several runs, by number, side by side; what differs between runs has rows of its own."""
    passed: dict[tuple[str, ...], dict[int, str]] = {}
    for n, rows in runs.items():
        for r in rows:
            passed.setdefault((r.model, r.implementation, r.sites, r.replaced, r.why), {})[n] = r.passed
    order = list(dict.fromkeys(r.model for rows in runs.values() for r in rows))
    head = ["model", "attention", "sites", "replaced", "dense because", *(f"passed, run {n}" for n in runs)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(passed, key=lambda row: order.index(row[0])):
        lines.append("| " + " | ".join(_cell(c) for c in (*row, *(passed[row].get(n, "") for n in runs))) + " |")
    return [*lines, ""]


def _cell(text: str) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 160 else text[:157] + "..."


def rich_table(results: Sequence[Result]) -> Any:
    """The same for a terminal."""
    from rich.table import Table

    table = Table("library", "model", "attention", "sites", "replaced", "passed", "dense because")
    for r in summarise(results):
        style = "red" if r.failures else None
        table.add_row(r.library, r.model, r.implementation, r.sites, r.replaced, r.passed, _cell(r.why), style=style)
    return table
