"""The table of page indexes for decode, by emulation: what each kind reads, and what it costs in quality.

    python -m tsa_compile.tools.evaluate.page_indexes MODEL OUT.jsonl --length 31744 --texts 8 --keep 0.01,0.02,0.05,0.1

decodes the last 128 positions of each text under every kind and share (`emulate_decode.py`), adds a line of JSON to OUT for each
cell, and prints the table. What is there already is not measured again: after an interruption, or `--seconds`, the same command
goes on. Texts come from FOLDER/*.txt (`--folder`), or from Python's own documentation and sources. MODEL: a folder, a .gguf file,
a packaged name or an id.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from tsa_compile.tools.evaluate.emulate import Job, Spec, read_texts
from tsa_compile.tools.evaluate.emulate_model import Emulator, load_model
from tsa_compile.tools.evaluate.emulate_texts import standard_texts
from tsa_compile.tools.evaluate.index_table import tables
from tsa_compile.tools.option_values import numbers

_KEPT = {"kind": "kept_basis"}  # what `PageSparse(kind="basis")` keeps
_TWO = _KEPT | {"first": 0.2}
KINDS: tuple[tuple[str, dict[str, Any], str], ...] = (  # name, rule, budget
    ("exact page masses (oracle)", {"index": {"kind": "exact"}}, "equal"),
    ("mean", {"index": {"kind": "mean"}}, "equal"),
    ("means 20 %, then basis", {"index": _TWO}, "equal"),
    ("basis of every page", {"index": _KEPT}, "equal"),
    ("mean, completion", {"index": {"kind": "mean"}, "completion": "mean"}, "equal"),
    ("means 20 %, then basis, completion", {"index": _TWO, "completion": "mean"}, "equal"),
    ("mean, by head", {"index": {"kind": "mean"}}, "head"),
    ("means 20 %, then basis, by head", {"index": _TWO}, "head"),
    ("mean, by head, completion", {"index": {"kind": "mean"}, "completion": "mean"}, "head"),
    ("means 20 %, then basis, by head, completion", {"index": _TWO, "completion": "mean"}, "head"),
    ("exact page masses, by head, completion", {"index": {"kind": "exact"}, "completion": "mean"}, "head"),
    ("means 20 %, then basis, by layer", {"index": _TWO}, "layer"),
    ("means 20 %, then basis, by mass", {"index": _TWO}, "mass"),
    ("means 20 %, then basis, completed by its masses", {"index": _TWO, "completion": "index"}, "equal"),
    ("means 15 %, then basis", {"index": _KEPT | {"first": 0.15}}, "equal"),
    ("mean and variance", {"index": {"kind": "variance"}}, "equal"),
    ("mean before RoPE", {"index": {"kind": "prerope"}}, "equal"),
    ("mean without the head's constant key before RoPE", {"index": {"kind": "unbiased"}}, "equal"),
    ("the same and variance", {"index": {"kind": "unbiased_variance"}}, "equal"),
    ("min/max", {"index": {"kind": "minmax"}}, "equal"),
    ("2 means", {"index": {"kind": "mean", "parts": 2}}, "equal"),
    ("basis 8 as published: exact directions", {"index": {"kind": "basis"}}, "equal"),
    ("basis 8 as published: in 4 bits", {"index": {"kind": "basis", "bits": 4}}, "equal"),
    ("means 20 %, then basis; every 2nd layer selects", {"index": _TWO, "anchors": 2}, "equal"),
    ("means 20 %, then basis; every 4th layer selects", {"index": _TWO, "anchors": 4}, "equal"),
)  # fmt: skip
DISTANCES = (1, 2, 3, 4, 8)
REUSE = "exact top pages of earlier layers"


def specs(keep: list[float]) -> Iterable[tuple[str, Spec]]:
    """(phase, spec) of every row of the table."""
    yield "reuse", {"name": REUSE, "distances": DISTANCES, "keep": keep}
    for name, rule, budget in KINDS:
        yield "decode", {"name": name, "rule": rule, "budget": budget, "keep": keep}


def fill(job: Job, keep: list[float], seconds: float) -> bool:
    """Measure text by text; False: the time was up before all was there."""
    end = time.monotonic() + seconds
    for text in job.texts:
        for phase, spec in specs(keep):
            if time.monotonic() > end:
                return False
            getattr(job, phase)(spec, text)
    return True


def main(
    model: str,
    out: Path,
    length: Annotated[int, typer.Option(help="tokens of a text, a multiple of 16")] = 31744,
    texts: Annotated[int, typer.Option(help="how many, without --folder")] = 8,
    keep: Annotated[str, typer.Option(help="shares of the pages that are read")] = "0.01,0.02,0.05,0.1",
    folder: Annotated[Path | None, typer.Option(help="texts of your own, *.txt")] = None,
    seconds: Annotated[float, typer.Option(help="stop after these; the same command goes on")] = 3600.0,
) -> None:
    """Measure every kind of page index on MODEL, and print the table."""
    shares = numbers("--keep", keep, float)
    network, tokenizer = load_model(model)
    given = standard_texts(tokenizer, length, texts) if folder is None else read_texts(folder, tokenizer, length)
    job = Job(Emulator(network), given, out)
    done = fill(job, list(shares), seconds)
    rows = [row for row in job.rows if row["length"] == length]
    print(tables(rows, [name for name, _, _ in KINDS], REUSE))
    if not done:
        print("\nNot complete: run the same command again.")


if __name__ == "__main__":
    typer.run(main)
