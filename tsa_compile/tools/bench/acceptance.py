"""How many drafted tokens a model accepts: speculative generation behind real texts, draft by draft. It takes no times."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import math
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tsa_compile import api
from tsa_compile.generate.named_drafts import sinks_and_window
from tsa_compile.generate.speculative import generate
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.policies.remembered import Remembered
from tsa_compile.session import attached
from tsa_compile.tools.evaluate.reference_text import reference_text

LEAST = 256  # keys that a draft reads


def keys_of(share: float, length: int, least: int) -> int:
    return max(least, round(share * length))


def _pages(share: float, length: int, least: int) -> PageSparse:
    pages = max(2, -(-keys_of(share, length, least) // 16))
    return PageSparse(pages=pages, recent=min(3, pages - 1))


#: By name: the draft that reads a share of the keys behind so many tokens, and at least so many keys.
DRAFTS: Mapping[str, Callable[[float, int, int], Any]] = {
    "verify": lambda share, length, least: Remembered("verify", keys=least, ratio=share),
    "layer": lambda share, length, least: Remembered("verify", keys=least, ratio=share, share="layer"),
    "pages": lambda share, length, least: _pages(share, length, least),
    "window": lambda share, length, least: sinks_and_window(max(16, keys_of(share, length, least) - 16)),
    "lookup": lambda share, length, least: "lookup",
}
TEXTS: Mapping[str, Callable[[], str]] = {"prose": reference_text, "code": lambda: inspect.getsource(argparse)}


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """One draft behind one text.

    Args:
        draft, text: keys of `DRAFTS` and `TEXTS`.
        length: tokens of the text before the first new one.
        share: of the keys, that a draft reads (at least 256).
        gamma: tokens of a draft.
        new: tokens that were generated.
        tokens_a_verify: of gamma + 1.
        acceptance: by place in the draft, of those that were reached.
        equal: greedy: are the tokens those of the untouched model? None: they were sampled.
    """

    draft: str
    text: str
    length: int
    share: float
    gamma: int
    new: int
    tokens_a_verify: float
    acceptance: tuple[float, ...]
    equal: bool | None


def measure(
    model: Any, tokenizer: Any, drafts: list[str], lengths: list[int], new: int, gamma: int, share: float, sampled: bool
) -> Iterator[Acceptance]:
    """Each draft behind each text and length; transforms the model, and restores it.

    Args:
        drafts: keys of `DRAFTS`.
        sampled: with temperature 0.6 and top-p 0.95, from seed 0, as Vegas was measured; or greedy.
    """
    how = dict(do_sample=True, temperature=0.6, top_p=0.95, top_k=0) if sampled else dict(do_sample=False)
    prompts = {(text, n): _ids(model, tokenizer, TEXTS[text](), n) for text in TEXTS for n in lengths}
    options = {"max_new_tokens": new, "min_new_tokens": new, **how}
    own = {key: None if sampled else _generate(model, ids, options) for key, ids in prompts.items()}
    api.transform(model, Plan(prefill=Dense(), decode=Exact()))
    try:
        for draft in drafts:
            for (text, length), ids in prompts.items():
                session = attached(model)
                assert session is not None
                session.speculation = None
                got = _generate(model, ids, {**options, "draft": DRAFTS[draft](share, length, LEAST), "gamma": gamma})
                seen, want = session.speculation, own[text, length]
                assert seen is not None
                shares = tuple(round(x, 4) for x in seen.acceptance)
                equal = None if want is None else torch.equal(got, want)
                yield Acceptance(draft, text, length, share, gamma, new, round(seen.tokens_a_verify, 3), shares, equal)
    finally:
        api.restore(model)


def read(path: str) -> list[Acceptance]:
    """The rows of a file of `tsa-compile bench acceptance --json`.

    Raises:
        ValueError: it is none; the message names it.
    """
    try:
        return [Acceptance(**row) for row in json.loads(Path(path).read_text())["rows"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of `tsa-compile bench acceptance --json`: {error}") from error


def tokens_a_round(rows: Sequence[Acceptance], draft: str, length: int, gamma: int, share: float) -> float:
    """Tokens that a round of `gamma` drafted ones gives, in the mean over texts of the measured length that is nearest.

    By acceptance by place, so drafts that were measured with more tokens say it, too. A place that was never reached counts as
    never kept.

    Raises:
        ValueError: no such draft was measured, or only with fewer tokens.
    """
    known = [row for row in rows if (row.draft, row.share) == (draft, share) and row.gamma >= gamma]
    if not known:
        found = sorted({(row.draft, row.share, row.gamma) for row in rows})
        raise ValueError(f"no acceptance of {draft}, share {share}, gamma {gamma} or more; known (draft, share, gamma): {found}")
    nearest = min((row.length for row in known), key=lambda n: abs(math.log(n / length)))
    texts = [row.acceptance[:gamma] for row in known if row.length == nearest]
    return statistics.fmean(1 + sum(itertools.accumulate(places, operator.mul)) for places in texts)


def _ids(model: Any, tokenizer: Any, text: str, length: int) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(text[: 12 * length], return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"the text has {ids.shape[1]} tokens, fewer than {length}")
    return ids.to(model.device)


def _generate(model: Any, ids: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    tokens: torch.Tensor = generate(model, ids, attention_mask=torch.ones_like(ids), **options)
    return tokens
