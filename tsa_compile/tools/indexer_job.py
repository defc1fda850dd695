"""The work of `tsa-compile indexer`: roles of heads, an index for those that look things up, and what both are worth."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tsa_compile.index_weights import load_indexes
from tsa_compile.learn.head_roles import head_roles
from tsa_compile.learn.indexer import train_indexer
from tsa_compile.learn.indexer_recall import FEW_PAGES, Recall, recalls
from tsa_compile.learn.indexer_settings import Training
from tsa_compile.learn.model_inputs import held_back
from tsa_compile.learn.routes import divergence
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.head_split import HeadSplit
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.progress import progress
from tsa_compile.tools.evaluate.decode_runner import DecodeRunner

Tensor = torch.Tensor
TRAINED, FIRST = "trained", "first weights"


@dataclasses.dataclass(frozen=True)
class Request:
    """Args:
    out: the plan; its weights, the first weights and what is measured lie beside it.
    share, window, prefill: of the roles.
    training: of the index.
    held_out: texts at the end that are measured, and not trained on.
    last: tokens at the end of each of them that are decoded; 0: none.
    state: of the training.
    """

    out: Path
    share: float
    window: int
    prefill: bool
    training: Training
    held_out: int
    last: int
    state: Path | None


def pieces(texts: Iterable[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The texts joined, and cut into pieces of these lengths in turn; the rest is left out."""
    joined = [i for text in texts for i in text]
    found: list[list[int]] = []
    while len(joined) >= lengths[len(found) % len(lengths)]:
        length = lengths[len(found) % len(lengths)]
        found.append(joined[:length])
        joined = joined[length:]
    return found


def run(model: Any, texts: Sequence[Sequence[int]], request: Request, console: Console) -> dict[str, Any]:
    """Train and measure; prints tables, and writes `out`, its weights and `out` with ".measured.json"."""
    own, held = held_back(texts, request.held_out)
    seconds: dict[str, float] = {}
    with _timed(seconds, "roles", console):
        roles = head_roles(model, own[:2], request.share, policy=HeadSplit((), window=request.window), prefill=request.prefill)
    first_out = request.out.with_suffix(".first.json")
    with _timed(seconds, "first weights", console):
        train_indexer(model, own, roles, first_out, dataclasses.replace(request.training, epochs=0))
    with _timed(seconds, "training", console):
        plan = train_indexer(model, own, roles, request.out, request.training, state=request.state)
    kinds = {TRAINED: load_indexes(str(plan.weights)), FIRST: load_indexes(first_out.with_suffix(".safetensors"))}
    with _timed(seconds, "recall", console):
        found = recalls(model, held, kinds, request.training.mass)
    console.print(_recall_table(found, roles))
    decoded: dict[str, Any] = {}
    if request.last:
        with _timed(seconds, "decoding", console):
            decoded = _decoded(model, held, _plans(plan, roles, found), request.last)
        console.print(_decode_table(decoded))
    told = {
        "texts": [len(text) for text in texts], "held out": request.held_out, "heads": roles.notes["heads"],
        "training": plan.notes["index"], "recall": {name: dataclasses.asdict(x) for name, x in found.items()},
        "decode": decoded, "seconds": seconds, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "dtype": str(model.dtype),
    }  # fmt: skip
    request.out.with_suffix(".measured.json").write_text(json.dumps(told, indent=1) + "\n")
    return told


class _timed:
    """Notes how long a block takes, and says so."""

    def __init__(self, seconds: dict[str, float], name: str, console: Console) -> None:
        self._seconds, self._name, self._console = seconds, name, console

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds[self._name] = round(time.perf_counter() - self._start, 2)
        self._console.print(f"{self._name}: {self._seconds[self._name]:.1f} s", highlight=False)


def _plans(plan: Plan, roles: Plan, found: dict[str, Recall]) -> dict[str, Plan]:
    """The index beside policies without training: whole context for heads that look things up, pages by their mean keys."""
    keep = round(max(found[TRAINED].pages, 1e-3), 4)
    means = tuple(
        rule._replace(policy=dataclasses.replace(rule.policy, keep=keep)) if isinstance(rule.policy, HeadSplit) else rule
        for rule in roles.rules
    )
    return {
        "roles, trained index": plan,
        "roles, whole context": roles,
        f"roles, page means ({keep:.1%})": dataclasses.replace(roles, rules=means),
        f"no roles, page means ({keep:.1%})": Plan(prefill=Dense(), decode=PageSparse(keep=keep)),
    }


@torch.no_grad()
def _decoded(model: Any, held: Sequence[Sequence[int]], plans: dict[str, Plan], last: int) -> dict[str, Any]:
    """KL of the logits and bytes of the cache that steps read, of what `Exact` reads; the prefill is dense."""
    runner, device = DecodeRunner(model), model.device
    kl: dict[str, list[float]] = {name: [] for name in plans}
    read: dict[str, list[float]] = {name: [] for name in plans}
    with progress() as start:
        advance = start("decoding", len(plans) * len(held))
        for name, plan in plans.items():
            runner.use(plan)
            for text in held:
                ids = torch.tensor([list(text)], device=device)
                dense = model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0]
                request = runner.prefill(ids[:, :-last], last)
                bytes_of_row = sum(x.keys[0, :, 0].nbytes + x.values[0, :, 0].nbytes for x in request.cache.layers)
                with runner.counted(request) as traffic:
                    for n in range(last):
                        step = runner.step(ids[:, ids.shape[1] - last + n, None], request)
                        kl[name].append(float(divergence(dense[n], step[0, -1])))
                every = sum(range(ids.shape[1] - last + 1, ids.shape[1] + 1)) * bytes_of_row
                read[name].append(sum(traffic.read.values()) / every)
                advance(f"decoding: {name}")
    return {
        name: {"KL": sum(kl[name]) / len(kl[name]), "largest": max(kl[name]), "bytes": sum(read[name]) / len(held)}
        for name in plans
    }


def _recall_table(found: dict[str, Recall], roles: Plan) -> Table:
    table = Table("index", "pages read", "attention in them", "bytes", title=f"Heads that look things up: {roles.notes['heads']}")
    for name, x in found.items():
        table.add_row(name, f"{x.pages:.1%}", f"{x.recall:.1%}", "" if name == FEW_PAGES else f"{x.bytes:.1%}")
    return table


def _decode_table(decoded: dict[str, Any]) -> Table:
    table = Table("decode", "bytes of Exact's", "mean KL", "largest", title="Steps over the cache, after a dense prefill")
    for name, x in decoded.items():
        table.add_row(name, f"{x['bytes']:.1%}", f"{x['KL']:.4f}", f"{x['largest']:.3f}")
    return table
