"""The work of `tsa-compile lookahead`: an index for `Resident`, and what its sets hold beside others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tsa_compile.index_weights import load_indexes
from tsa_compile.learn.lookahead import train_lookahead
from tsa_compile.learn.lookahead_recall import lookahead_recall
from tsa_compile.learn.lookahead_settings import LookaheadTraining
from tsa_compile.learn.model_inputs import held_back
from tsa_compile.plan import Plan


def run(
    model: Any,
    texts: Sequence[Sequence[int]],
    plan: Plan,
    out: Path,
    training: LookaheadTraining,
    held_out: int,
    state: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Train on all texts but the last `held_out`, which are measured; writes `out`, its weights and `out` with ".measured.json".

    Raises:
        ValueError: too few texts.
    """
    own, held = held_back(texts, held_out)
    first = out.with_suffix(".first.json")
    train_lookahead(model, own[:1], plan, first, dataclasses.replace(training, epochs=0))
    made = train_lookahead(model, own, plan, out, training, state=state)
    kinds = {"trained": load_indexes(str(made.weights)), "first weights": load_indexes(first.with_suffix(".safetensors"))}
    policy: Any = made.decode
    found = lookahead_recall(model, held, kinds, policy)
    table = Table("pages by", "attention in them", title="Of what the next steps attend to outside of the sinks and last pages")
    for name, share in found.items():
        table.add_row(name, f"{share:.1%}")
    console.print(table)
    told = {
        "texts": [len(text) for text in texts], "held out": held_out, "policy": policy.to_dict(), "recall": found,
        "training": made.notes["lookahead"], "torch": torch.__version__, "dtype": str(model.dtype),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    out.with_suffix(".measured.json").write_text(json.dumps(told, indent=1) + "\n")
    return told
