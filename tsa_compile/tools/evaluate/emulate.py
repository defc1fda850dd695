"""What rules of sparse attention cost on real models, before they have kernels: prefill by key blocks, decode by pages.

`python -m tsa_compile.tools.evaluate.emulate MODEL TEXTS SPEC OUT` runs the rules of SPEC (JSON) on the files TEXTS/*.txt and
adds one line of JSON to OUT for each (rule, share, text); lines that are there already are not measured again. SPEC:

    {"length": 31744,
     "prefill": [{"name": "alpha", "rule": {"rows": 128, "keys": 64}, "pairs": [0.12], "by": "head"},
                 {"name": "default", "tokens": {"coverage": 0.05}}],
     "decode":  [{"name": "mean", "rule": {"index": {"kind": "mean"}}, "keep": [0.05], "budget": "equal"}],
     "reuse":   [{"name": "lists of earlier layers", "distances": [1, 2], "keep": [0.05]}]}

Fields of a rule: `BlockRule`, `CompletedRule` ("tokens"), `DecodeRule`, `Index`. "by": one threshold ("all", the default) or one
for each layer and head ("head"; "head and layer" weighs layers by what they cost alone). "budget": "equal", "layer", "head" (with
layers weighed as well: "cost"), "mass". Thresholds and budgets are fitted on the first text; its results say "fitted".
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tsa_compile.tools.evaluate import emulate_budget
from tsa_compile.tools.evaluate.emulate_blocks import BlockRule
from tsa_compile.tools.evaluate.emulate_decode import DecodeText
from tsa_compile.tools.evaluate.emulate_fit import Levels, Threshold, collect
from tsa_compile.tools.evaluate.emulate_model import Emulator, load_model
from tsa_compile.tools.evaluate.emulate_pages import Index
from tsa_compile.tools.evaluate.emulate_plan import Candidates, head_errors, layer_costs
from tsa_compile.tools.evaluate.emulate_prefill import CompletedRule, Reference, Rule, run_rule
from tsa_compile.tools.evaluate.emulate_reuse import overlap
from tsa_compile.tools.evaluate.emulate_select import Budget, DecodeRule

Tensor = torch.Tensor
Spec = Mapping[str, Any]
GRID = (0.5, 1.0, 1.7, 3.0)  # times the wanted share: thresholds that a plan by head chooses from


class Job:
    """Rules on texts of one length, results in a file of JSON lines."""

    def __init__(self, emulator: Emulator, texts: Mapping[str, Tensor], out: str | Path) -> None:
        """`texts`: name -> ids [L], all of one length; thresholds are fitted on the first."""
        self.emulator, self.texts, self._out = emulator, dict(texts), Path(out)
        self._fitted = next(iter(self.texts))
        self._references: dict[str, Reference] = {}
        self._decoded: dict[str, DecodeText] = {}
        self._thresholds: dict[tuple[Any, ...], Threshold] = {}
        self._budgets: dict[tuple[Any, ...], Budget] = {}
        self.rows: list[dict[str, Any]] = []
        if self._out.exists():
            self.rows = [json.loads(line) for line in self._out.read_text().splitlines()]

    def prefill(self, spec: Spec, text: str) -> None:
        """One prefill rule at all its shares on one text."""
        if "tokens" in spec:
            rule: Rule = CompletedRule(**spec["tokens"])
            self._add(("prefill", spec["name"], None, text), lambda: self._prefill(rule, 0.0, text))
            return
        blocks = BlockRule(**_tuples(spec["rule"]))
        for share in spec["pairs"]:

            def measure(share: float = share) -> dict[str, Any]:
                return self._prefill(blocks, self.threshold(blocks, share, spec.get("by", "all")), text)

            self._add(("prefill", spec["name"], share, text), measure)

    def decode(self, spec: Spec, text: str) -> None:
        """One decode rule at all its budgets on one text."""
        fields = dict(spec["rule"])
        budget = spec.get("budget", "equal")
        index = Index(**fields.pop("index", {}))
        rule = DecodeRule(index, **_tuples(fields), by_mass=budget == "mass")
        for keep in spec["keep"]:

            def measure(keep: float = keep) -> dict[str, Any]:
                return self.decoded(text).run(rule, self.budget(rule, keep, budget))

            self._add(("decode", spec["name"], keep, text), measure)
        for decoded in self._decoded.values():
            decoded.forget()

    def reuse(self, spec: Spec, text: str) -> None:
        """What the exact top pages of layers some distance before hold, on one text."""
        for keep in spec["keep"]:

            def measure(keep: float = keep) -> dict[str, Any]:
                return {"distances": overlap(self.decoded(text), keep, spec["distances"])}

            self._add(("reuse", spec["name"], keep, text), measure)

    def threshold(self, rule: BlockRule, share: float, by: str = "all") -> Threshold:
        """Reads `share` of the pairs of the text that it is fitted on."""
        key = (rule, share, by)
        if key not in self._thresholds:
            reference = self.reference(self._fitted)
            found = collect(self.emulator, reference.ids, rule)
            at = found.threshold(share)
            self._thresholds[key] = at if by == "all" else _by_head(reference, rule, found, share, by)
        return self._thresholds[key]

    def budget(self, rule: DecodeRule, keep: float, kind: str) -> Budget:
        """Reads `keep` of the pages of the text that it is fitted on, those of dense layers counted."""
        if kind == "equal":
            layers = len(self.decoded(self._fitted).layers())
            dense = len(rule.dense_layers)
            return (keep * layers - dense) / (layers - dense)
        key = (rule, keep, kind)
        if key not in self._budgets:
            text = self.decoded(self._fitted)
            if kind == "mass":
                self._budgets[key] = emulate_budget.by_mass(text, rule, keep)
            else:
                costs = emulate_budget.layer_costs(text, rule, keep) if kind == "cost" else None
                self._budgets[key] = emulate_budget.by_head(text, rule, keep, kind == "layer", costs)
        return self._budgets[key]

    def reference(self, text: str) -> Reference:
        if text not in self._references:
            self._references[text] = Reference(self.emulator, self.texts[text])
        return self._references[text]

    def decoded(self, text: str) -> DecodeText:
        """The text after its dense prefill; of those, the fitted one and the last one asked for are kept."""
        if text not in self._decoded:
            self._decoded = {n: t for n, t in self._decoded.items() if n == self._fitted}
            self._decoded[text] = DecodeText(self.emulator, self.texts[text])
        return self._decoded[text]

    def _prefill(self, rule: Rule, threshold: Threshold, text: str) -> dict[str, Any]:
        reference = self.reference(text)
        row = reference.compare(run_rule(self.emulator, reference.ids, rule, threshold), rule.last_dense)
        return row | {"threshold": threshold if isinstance(threshold, float) else "by layer and head"}

    def _add(self, key: tuple[str, str, float | None, str], measure: Any) -> None:
        named = dict(zip(("phase", "name", "share", "text"), key, strict=True)) | {"length": self.texts[key[3]].shape[0]}
        if any(all(row.get(k) == v for k, v in named.items()) for row in self.rows):
            return
        start = time.perf_counter()
        row = named | {"fitted": key[3] == self._fitted} | measure()
        row["seconds"] = round(time.perf_counter() - start, 2)
        self.rows.append(row)
        with self._out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _by_head(reference: Reference, rule: BlockRule, found: Levels, share: float, by: str) -> Threshold:
    grid = [found.threshold(min(max(share * x, found.base() / found.pairs * 1.02), 1.0)) for x in GRID]
    errors, pairs = head_errors(reference, rule, grid)
    costs = layer_costs(reference, rule, grid[1], list(errors[0])) if by == "head and layer" else None
    return Candidates(grid, errors, pairs, costs, 1).fit(found, share)


def read_texts(folder: str | Path, tokenizer: Any, length: int) -> dict[str, Tensor]:
    """The first `length` tokens of each FOLDER/*.txt, by file name.

    Raises:
        ValueError: there is none, or one is too short.
    """
    texts = {}
    for path in sorted(Path(folder).glob("*.txt")):
        ids = tokenizer(path.read_text(), add_special_tokens=False).input_ids
        if len(ids) < length:
            raise ValueError(f"{path} has {len(ids)} tokens, fewer than {length}")
        texts[path.stem] = torch.tensor(ids[:length])
    if not texts:
        raise ValueError(f"{folder} has no .txt files")
    return texts


def main(model: str, texts: str, spec: str, out: str) -> None:
    wanted = json.loads(Path(spec).read_text())
    network, tokenizer = load_model(model)
    job = Job(Emulator(network), read_texts(texts, tokenizer, wanted["length"]), out)
    for phase in ("prefill", "decode", "reuse"):
        for text in job.texts:
            for one in wanted.get(phase, ()):
                getattr(job, phase)(one, text)


if __name__ == "__main__":
    main(*sys.argv[1:5])
