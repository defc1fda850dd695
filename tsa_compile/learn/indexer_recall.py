"""How much of the attention of heads that look things up lies in the pages that an index chooses, beside other ways to choose.

Everything is measured on the dense model's own queries and keys: the last rows of each text, by page and KV head as steps read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.learn.attention_watch import last_shares, watched
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.learn.top_p import top_p
from tsa_compile.progress import progress as progress_bar

Tensor = torch.Tensor
MEANS, FEW_PAGES = "page means, as many pages", "the attention itself"


@dataclasses.dataclass
class Recall:
    """Means over KV heads with heads that look things up, rows and texts.

    Args:
        pages: share of a row's pages that are read.
        recall: share of the attention of heads that look things up that lies in them.
        bytes: what is read of keys, values and index, of what dense attention reads.
    """

    pages: float
    recall: float
    bytes: float


@torch.no_grad()
def recalls(
    model: nn.Module,
    prompts: Iterable[Any],
    kinds: Mapping[str, Mapping[str, HeadIndex]],
    mass: float,
    rows: int = 64,
    progress: bool = True,
) -> dict[str, Recall]:
    """Each kind of index by name; besides page means, with as many pages as the first kind reads, and the attention itself: the
    fewest pages that hold `mass` of it.

    Args:
        model: as for `train_indexer`; it is left as it was.
        prompts: texts, other ones than an index was trained on.
        kinds: indexes of the same attentions and heads, by path.
        mass: of the projected softmax that is read.
        rows: last rows of each text that are measured.
    """
    texts, found = texts_of(model, prompts, rows), dict[str, list[tuple[float, float, float]]]()
    first = next(iter(kinds.values()))

    def look(path: str, q: Tensor, k: Tensor, scale: float) -> None:
        for g in sorted({*first[path].owners}) if path in first else ():
            heads = [h for h, owner in zip(first[path].heads, first[path].owners, strict=True) if owner == g]
            for name, measured in _of_group(kinds, path, q[0], k[0], g, heads, scale, mass, rows):
                found.setdefault(name, []).append(measured)

    with progress_bar(show=progress) as start, watched(model, look):
        advance = start("index: recall", len(texts))
        for ids in texts:
            model(input_ids=ids, use_cache=False)
            advance()
    return {name: Recall(*(sum(x) / len(x) for x in zip(*all_of, strict=True))) for name, all_of in found.items()}


def _of_group(
    kinds: Mapping[str, Mapping[str, HeadIndex]], path: str, q: Tensor, k: Tensor, g: int, heads: list[int], scale: float,
    mass: float, rows: int,
) -> Iterable[tuple[str, tuple[float, float, float]]]:  # fmt: skip
    """(name, (pages, recall, bytes)) of one KV head; q `[H, L, D]`, k `[Hk, L, D]`, rotated."""
    truth = _by_page(last_shares(q[None, heads], k[None, g : g + 1], scale, rows)[0])  # [heads, rows, pages]
    end = torch.arange(k.shape[1] - rows, k.shape[1], device=k.device) + 1
    page = torch.arange(truth.shape[-1], device=k.device)
    whole, real = page < (end // PAGE)[:, None], page < (-(-end // PAGE))[:, None]
    number = real.sum(-1)

    def told(read: Tensor, index_bytes: float) -> tuple[float, float, float]:
        read = (read | ~whole) & real  # the open page is always read
        pages = float((read.sum(-1) / number).mean())
        return pages, float((truth * read).sum(-1).mean()), pages + index_bytes / (2 * k.shape[2] * k.element_size())

    taken: Tensor | None = None
    for name, by_path in kinds.items():
        index = by_path[path]
        own = [n for n, h in enumerate(index.heads) if h in heads]
        z = torch.stack([_projected(index, n, q[index.heads[n]], k[g], rows) for n in own])
        read = top_p(_shares(z, whole), mass).any(0)
        taken = read if taken is None else taken
        yield name, told(read, len(own) * index.query.shape[1] * k.element_size())
    assert taken is not None
    means = _means(q[heads, -rows:], k[g], scale)
    shares = means.masked_fill(~whole, -torch.inf).softmax(-1).nan_to_num(0.0).mean(0)
    rank = shares.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    yield MEANS, told(whole & (rank < taken.sum(-1, keepdim=True)), k.shape[2] * k.element_size() / PAGE)
    yield FEW_PAGES, told(top_p(truth * whole, mass).any(0), 0.0)


def _projected(index: HeadIndex, n: int, q: Tensor, k: Tensor, rows: int) -> Tensor:
    """Products of projections `[rows, L]`, -inf behind a row."""
    positions = torch.arange(k.shape[0], device=k.device)
    frequencies = index.frequencies.to(k.device)
    rotation = (frequencies, index.interleaved, index.factor)
    query = before_rotation(q[-rows:], positions[-rows:], *rotation) @ index.query[n].float().to(k.device).mT
    key = before_rotation(k, positions, *rotation) @ index.key[n].float().to(k.device).mT
    return (query @ key.mT).masked_fill(positions > positions[-rows:, None], -torch.inf)


def _shares(z: Tensor, whole: Tensor) -> Tensor:
    """The softmax over the keys of whole pages, by page."""
    pages = _paged(z, -torch.inf).logsumexp(-1).masked_fill(~whole, -torch.inf)
    return pages.softmax(-1).nan_to_num(0.0)


def _by_page(x: Tensor) -> Tensor:
    return _paged(x, 0.0).sum(-1)


def _paged(x: Tensor, fill: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % PAGE), value=fill).unflatten(-1, (-1, PAGE))


def _means(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Logits of pages by their mean keys, as `tsa::page_scores` has them, `[heads, rows, pages]`."""
    means = torch.nn.functional.pad(k.float(), (0, 0, 0, -k.shape[0] % PAGE)).unflatten(0, (-1, PAGE)).mean(1)
    return scale * q.float() @ means.mT
