"""Results, written cell by cell: an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tsa_compile.learn.state import write_whole
from tsa_compile.tools.evaluate.variants import Variant

FORMAT = "tsa_compile.evaluation"


class Store:
    """A JSON file of `setting` (what makes results comparable) and one entry for each (length, task, variant).

    Raises:
        ValueError: the file holds results of another setting; the message names what differs.
    """

    def __init__(self, path: str | Path, setting: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self.data: dict[str, Any] = {"format": FORMAT, "setting": dict(setting), "cells": []}
        if self._path.exists():
            self._resume(json.loads(self._path.read_text()))
        self._done = {(c["length"], c["task"], c["variant"]) for c in self.data["cells"]}

    def _resume(self, found: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(self.data["setting"]))
        other = found.get("setting", {})
        different = sorted(k for k in {*wanted, *other} if wanted.get(k) != other.get(k))
        if found.get("format") != FORMAT or different:
            raise ValueError(
                f"{self._path} holds results of another evaluation (differing: {', '.join(different) or 'format'}); "
                "give another folder or delete it"
            )
        self.data = found

    def has(self, length: int, task: str, variant: str) -> bool:
        return (length, task, variant) in self._done

    def add_variants(self, variants: Iterable[Variant]) -> None:
        """Write down what the variants are, beside those of earlier calls; by family, then by coverage."""
        known = {v["name"]: v for v in self.data.get("variants", [])}
        for v in variants:
            plan = None if v.plan is None else v.plan.to_dict()
            known[v.name] = {"name": v.name, "family": v.family, "coverage": v.coverage, "plan": plan}
        families = list(dict.fromkeys(v["family"] for v in known.values()))
        self.data["variants"] = sorted(known.values(), key=lambda v: (families.index(v["family"]), v["coverage"] or 0.0))

    def add(self, length: int, task: str, variant: str, values: Mapping[str, Any]) -> None:
        """Append a cell and write the file, in one step that a cut cannot tear."""
        self.data["cells"].append({"length": length, "task": task, "variant": variant, **values})
        self._done.add((length, task, variant))
        self.save()

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self.data, indent=None, separators=(",", ":")) + "\n")
