"""The rows of a table: what `BlockSparse` costs a model at a share of the pairs that it is forced to, by its own kernels.

    python -m tsa_compile.tools.evaluate.prefill_rows MODEL OUT --length 31744 --texts 8 --calibrate 3 --pairs 0.12

calibrates an alpha for each head on three texts (OUT/plan.json), brings that plan and one alpha for all to 12 % of the pairs of
eight other texts, each by one factor on its alphas, and prints KL, top-1, perplexity and errors over the rows that no rule makes
dense. `--plan FILE` adds plans of your own. What is measured goes to OUT; after an interruption, or `--seconds`, the same command
goes on. Texts are Python's own documentation and sources, by turns, or FOLDER/*.txt (`--folder`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tsa_compile.learn.calibrate import calibrate
from tsa_compile.learn.model_inputs import versions
from tsa_compile.learn.state import Measured
from tsa_compile.plan import Plan
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.tools.evaluate.emulate import read_texts
from tsa_compile.tools.evaluate.emulate_model import load_model
from tsa_compile.tools.evaluate.emulate_texts import standard_texts
from tsa_compile.tools.evaluate.forced_pairs import force
from tsa_compile.tools.evaluate.rows_meter import RowsMeter
from tsa_compile.tools.evaluate.runner import Runner
from tsa_compile.tools.evaluate.text_tables import markdown_table

Tensor = torch.Tensor
ONE, HEADS = "one alpha", "calibrated"
_HEAD = (
    "plan", "texts", "pairs", "KL, end", "KL, middle", "top-1", "perplexity / dense", "error", "worst head", "worst layer",
)  # fmt: skip


def split(texts: Mapping[str, Tensor], number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(`number` of the texts, spread over all; the others)."""
    chosen = {round((n + 0.5) * len(texts) / number) for n in range(number)} if number else set()
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for n, (name, ids) in enumerate(texts.items()):
        parts[n not in chosen][name] = ids
    return parts


class RowsJob:
    """Plans on texts; each text's row is measured once.

    Args:
        texts: of one length.
        state: a JSON file of what is measured.
        key: what else the measurements depend on.
    """

    def __init__(self, model: Any, texts: Mapping[str, Tensor], state: Path, key: Mapping[str, Any]) -> None:
        self._texts = dict(texts)
        self._meter = RowsMeter(Runner(model), next(iter(self._texts.values())))
        digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in self._texts.values())).hexdigest()[:16]
        self._measured = Measured(state, {**key, "texts": digest, "versions": versions(model)})

    def rows(self, name: str, plan: Plan, share: float) -> Iterator[dict[str, Any]]:
        """A row for each text, of the plan at `share` of the pairs."""
        known = f"{name}, {hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()[:12]}, {share:g}"
        found = self._measured.get(f"{known}: forced", lambda: self._forced(plan, share))
        forced = Plan.from_dict(found["plan"])
        for text, ids in self._texts.items():
            row = self._measured.get(f"{known}: {text}", partial(self._meter.measure, ids, forced))
            yield {"plan": name, "text": text, "factor": found["factor"], **row}

    def _forced(self, plan: Plan, share: float) -> dict[str, Any]:
        def pairs(tried: Plan) -> float:
            return sum(self._meter.pairs(ids, tried) for ids in self._texts.values()) / len(self._texts)

        forced, factor = force(plan, share, pairs)
        return {"plan": forced.to_dict(), "factor": factor}


def line(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The mean over the texts; of heads and layers, the worst of any."""
    mean = {f: sum(r[f] for r in rows) / len(rows) for f in ("pairs", "kl_end", "kl_middle", "top1_end", "error")}
    ratio = sum(r["perplexity"] / r["dense_perplexity"] for r in rows) / len(rows)
    worst = {f: max(r[f] for r in rows) for f in ("worst_head", "worst_layer")}
    return [
        name, str(len(rows)), f"{100 * mean['pairs']:.2f} %", f"{mean['kl_end']:.4f}", f"{mean['kl_middle']:.4f}",
        f"{100 * mean['top1_end']:.1f} %", f"{ratio:.4f}", f"{mean['error']:.3f}", f"{worst['worst_head']:.2f}",
        f"{worst['worst_layer']:.3f}",
    ]  # fmt: skip


def main(
    model: str,
    out: Path,
    length: Annotated[int, typer.Option(help="tokens of a text")] = 31744,
    texts: Annotated[int, typer.Option(help="how many are measured, without --folder")] = 8,
    calibrated: Annotated[int, typer.Option("--calibrate", help="further texts that alphas are found on; 0: no calibration")] = 3,
    pairs: Annotated[float, typer.Option(help="share of the pairs that plans are brought to")] = 0.12,
    plan: Annotated[list[Path] | None, typer.Option(help="JSON file of a plan or policy to measure as well")] = None,
    policy: Annotated[str, typer.Option(help="JSON of the BlockSparse that is calibrated, such as its last_dense")] = "{}",
    method: Annotated[str, typer.Option(help="of the calibration: loss, or error with far fewer runs")] = "loss",
    folder: Annotated[Path | None, typer.Option(help="texts of your own, *.txt; the calibration takes some of them")] = None,
    seconds: Annotated[float, typer.Option(help="stop after these; the same command goes on")] = 3600.0,
) -> None:
    """Measure MODEL, write OUT/rows.json and print the table."""
    end, base = time.monotonic() + seconds, BlockSparse(**json.loads(policy))
    out.mkdir(parents=True, exist_ok=True)
    own = {path.stem: Plan.load(path) for path in plan or ()}
    network, tokenizer = load_model(model)
    given = standard_texts(tokenizer, length, texts + calibrated) if folder is None else read_texts(folder, tokenizer, length)
    fitted, measured = split(given, calibrated)
    plans = {ONE: Plan(prefill=base)}
    if fitted:
        plans[HEADS] = _calibrated(network, fitted, pairs, base, method, out)
    job = RowsJob(network, measured, out / "state.json", {"model": model, "length": length})
    rows, done = _fill(job, {**plans, **own}, pairs, end)
    (out / "rows.json").write_text(json.dumps({"length": length, "pairs": pairs, "rows": rows}, indent=1) + "\n")
    names = list(dict.fromkeys(row["plan"] for row in rows))
    print(markdown_table([_HEAD, *(line(name, [r for r in rows if r["plan"] == name]) for name in names)]))
    if not done:
        print("\nNot complete: run the same command again.")


def _calibrated(network: Any, texts: Mapping[str, Tensor], pairs: float, base: BlockSparse, method: str, out: Path) -> Plan:
    target, prompts = f"pairs<={pairs:g}", list(texts.values())
    plan = calibrate(network, prompts, target, policy=base, method=method, state=out / "calibration.json")
    plan.save(out / "plan.json")
    return plan


def _fill(job: RowsJob, plans: Mapping[str, Plan], pairs: float, end: float) -> tuple[list[dict[str, Any]], bool]:
    """(Rows; whether all are there before the time is up)."""
    rows = []
    for name, plan in plans.items():
        for row in job.rows(name, plan, pairs):
            rows.append(row)
            if time.monotonic() > end:
                return rows, False
    return rows, True


if __name__ == "__main__":
    typer.run(main)
