"""The decode steps that `tsa-compile bench decode` checks and times, each a call on one layer's buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile.tools.bench.decode_cases import RECENT, SINKS, Buffers, DecodeCase

Tensor = torch.Tensor
Form = Callable[[Buffers], Any]
Lists = tuple[Tensor, Tensor]
PADDING = 5  # rows before the first key
SAMPLES = {"prop": 128, "flash": 2048, "teams": 1024}  # as published


def exact(case: DecodeCase, x: Buffers, key_mask: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Every key."""
    return torch.ops.tsa.decode_attention(x.q, x.k, x.v, None, 1, None, x.lengths, key_mask, case.scale, **more)


def score(case: DecodeCase, x: Buffers) -> tuple[Tensor, Tensor]:
    """Logits of all pages."""
    return torch.ops.tsa.page_scores(x.q, x.sums, x.counts, None, 1, None, x.lengths, case.length, case.scale)


def select(case: DecodeCase, x: Buffers, scores: tuple[Tensor, Tensor]) -> Lists:
    """The best pages by these logits."""
    rule = (case.kv_heads, [case.keep], [0], 0.0, SINKS, RECENT)
    return torch.ops.tsa.select_pages(*scores, x.counts, None, 1, None, x.lengths, case.length, *rule)


def attend(case: DecodeCase, x: Buffers, pages: Lists) -> tuple[Tensor, Tensor]:
    """The keys of these pages."""
    return torch.ops.tsa.page_attention(x.q, x.k, x.v, *pages, None, 1, None, x.lengths, None, case.scale)


def sampled(case: DecodeCase, x: Buffers, form: str) -> tuple[Tensor, Tensor]:
    """Every key, and so many values; or the keys of representatives, and teams of four keys."""
    if form == "teams":
        cache = (x.q, x.k, x.v, x.teams, None, 1, None, x.lengths, None, case.scale)
        return torch.ops.tsa.team_attention(*cache, x.seed, *teams_read())
    rule = (x.seed, SAMPLES[form], form)
    return torch.ops.tsa.sampled_value_attention(x.q, x.k, x.v, None, 1, None, x.lengths, None, case.scale, *rule)


def exact_forms(case: DecodeCase, device: torch.device) -> dict[str, Form]:
    """Dense attention as a user has it, and `tsa::decode_attention` without and with masks."""
    causal = torch.ones(case.rows, case.rows, dtype=torch.bool).tril()
    mask = F.pad(causal, (case.length - case.rows, 0), value=True).to(device) if case.rows > 1 else None
    start = torch.full((case.batch,), PADDING, dtype=torch.int32, device=device)
    lengths = torch.full_like(start, case.length - PADDING)
    key_mask = torch.arange(case.length, device=device).remainder(7).ne(0).repeat(case.batch, 1)

    def padded(x: Buffers) -> Any:
        return torch.ops.tsa.decode_attention(x.q, x.k, x.v, None, 1, start, lengths, None, case.scale)

    return {
        "SDPA": lambda x: F.scaled_dot_product_attention(x.q, x.k, x.v, mask, enable_gqa=True),
        "exact": lambda x: exact(case, x),
        "exact, padded": padded,
        "exact, key mask": lambda x: exact(case, x, key_mask),
        "exact, scores": lambda x: exact(case, x, scores=True),
    }


def teams_read() -> tuple[int, int]:
    """(teams that a query head draws, recent pages that are read whole)."""
    return SAMPLES["teams"] // 4, RECENT + 1


def sampled_forms(case: DecodeCase) -> dict[str, Form]:
    """A step by sampled values, in all forms."""
    return {f"sampled, {form}": functools.partial(sampled, case, form=form) for form in SAMPLES}


def page_forms(case: DecodeCase, buffers: Sequence[Buffers]) -> dict[str, Form]:
    """A step by pages; its three parts alone, on results made here; the append of a row that fills a page."""
    scores = {id(x): score(case, x) for x in buffers}
    lists = {id(x): select(case, x, scores[id(x)]) for x in buffers}

    def append(x: Buffers) -> None:
        torch.ops.tsa.append_pages(x.sums, x.counts, x.k, None, 1, None, x.before, x.lengths, None, 1)

    return {
        "pages": lambda x: attend(case, x, select(case, x, score(case, x))),
        "score": lambda x: score(case, x),
        "select": lambda x: select(case, x, scores[id(x)]),
        "attend": lambda x: attend(case, x, lists[id(x)]),
        "append": append,
    }
