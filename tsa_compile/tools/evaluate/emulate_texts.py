"""Texts that every Python has, for emulations that are given none: prose and code by turns."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tsa_compile.tools.evaluate.reference_text import reference_text

Tensor = torch.Tensor
_STEP = 8  # characters a token, at most as a rule: how much text is cut before it is known how many tokens it has


def standard_texts(tokenizer: Any, length: int, number: int) -> dict[str, Tensor]:
    """{name: ids [length]}: pieces of the language reference and of the standard library's sources, none twice.

    Raises:
        ValueError: there is not so much text.
    """
    texts = {}
    for kind, of, count in (("prose", reference_text, -(-number // 2)), ("code", library_code, number // 2)):
        for n, ids in enumerate(_pieces(tokenizer, kind, of, length, count)):
            texts[f"{kind} {n}"] = torch.tensor(ids)
    return texts


def library_code() -> str:
    """The sources of the standard library's own modules, one behind the other in a fixed random order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(paths)
    return "\n\n".join(path.read_text(errors="replace") for path in paths)


def _pieces(tokenizer: Any, kind: str, of: Callable[[], str], length: int, count: int) -> list[list[int]]:
    if not count:
        return []
    whole, start = of(), 0
    pieces: list[list[int]] = []
    while len(pieces) < count:
        width = _STEP * length
        ids: list[int] = tokenizer(whole[start : start + width], add_special_tokens=False).input_ids
        if len(ids) < length:
            raise ValueError(f"there is {kind} for {len(pieces)} pieces of {length} tokens, {count} were asked for")
        pieces.append(ids[:length])
        start += width
    return pieces
