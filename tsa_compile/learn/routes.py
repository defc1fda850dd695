"""A plan whose layers share selections (`Plan.reuse`), chosen on the user's texts: by similarity, or by loss.

By similarity, one forward a text (Kascade, arXiv 2512.16391): what a layer would capture of its attention by another's pages,
weighed by how much its attention moves the hidden states; the anchors by dynamic programming. By loss (IndexCache, arXiv
2603.12201): one layer after the other stops to select, that which costs least, over many decodings of the texts' ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tsa_compile.kernels.common.pages import PAGE, pages_of
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.select.top_pages.budget import budget
from tsa_compile.learn.anchors import best_anchors, greedy_anchors, similarity, weights_of
from tsa_compile.learn.attention_masses import recorded
from tsa_compile.learn.text_decoder import TextDecoder, texts_of
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.progress import Start
from tsa_compile.progress import progress as progress_bar
from tsa_compile.reuse import Reuse

Tensor = torch.Tensor
METHODS = ("similarity", "loss")


@dataclasses.dataclass(frozen=True)
class Routes:
    """What was measured.

    Args:
        paths: of the attentions, in order.
        similar: `[L, L, Hk, Hk]` of `anchors.similarity`, mean over the texts.
        importance: `[L]`, mean over the texts.
    """

    paths: list[str]
    similar: Tensor
    importance: Tensor

    def reuse(self, anchors: Sequence[int]) -> tuple[Reuse, ...]:
        """Every other layer reads the nearest anchor before it: each KV head the anchor's head that is most similar."""
        entries = []
        for b in range(len(self.paths)):
            a = max(anchor for anchor in anchors if anchor <= b)
            if a != b:
                heads = tuple(self.similar[a, b].argmax(-1).tolist())
                entries.append(Reuse(self.paths[b], self.paths[a], heads))
        return tuple(entries)


def plan_routes(
    model: nn.Module,
    prompts: Iterable[Any],
    policy: PageSparse,
    anchors: int,
    *,
    method: str = "similarity",
    last: int = 32,
    quantile: float = 0.0,
    max_span: int | None = None,
    prefill: Policy | None = None,
    same_bytes: bool = True,
    progress: bool = True,
) -> Plan:
    """A plan in which `anchors` layers select in decode steps, and the others read the pages of the nearest one before them.

    Args:
        model: a transformers model in evaluation mode with causal attention, which is left as it was.
        prompts: token ids, one unpadded text an entry, longer than `last`; published: 1,000 questions over several documents.
        policy: of all layers; its budget is a `keep` for all heads, `pages` or a `schedule`.
        anchors: layers that select, the first among them.
        method: "similarity", or "loss": layers x (layers - anchors) / 2 and more decodings of the texts' ends.
        last: tokens at the end of a text that are looked at, or decoded.
        quantile: of these, in [0, 1), whose similarity counts; 0: the worst token's.
        max_span: layers that read one anchor at most, itself included, by similarity; None: any number.
        same_bytes: layers that do not select read no page means; the `keep` of all grows by so many bytes. False: it stays.
        prefill: a policy of prefill whose lists are shared by the same anchors and heads; None: prefill is dense.
        progress: show a progress bar on stderr.

    Returns:
        Its `notes` have the anchors, the similarity of each layer to its anchor and the loss, if it was measured.

    Raises:
        ValueError: an argument is wrong, or the model's attention cannot be measured; the message says what.
    """
    if method not in METHODS or (max_span is not None and method == "loss"):
        raise ValueError(f"method must be one of {METHODS}, and 'loss' has no max_span, got {method!r} and {max_span!r}")
    if prefill is not None and not prefill.shareable:
        raise ValueError(f"prefill must be a policy whose lists others can read, got {prefill}")
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be in [0, 1), got {quantile!r}")
    _budget(policy)
    texts = texts_of(model, prompts, last)
    with progress_bar(show=progress) as start:
        routes, policy = _measured(model, texts, policy, anchors if same_bytes else None, last, quantile, start)
        notes: dict[str, Any] = {"made by": "tsa_compile.learn.routes", "method": method}
        if method == "similarity":
            chosen = best_anchors(weights_of(routes.similar, routes.importance), anchors, max_span)
        else:
            chosen, notes["kl"] = _by_loss(model, texts, policy, routes, anchors, last, start)
    notes |= {"anchors": chosen, "similarity to the anchor": _similarities(routes, chosen)}
    plan = _plan(policy, routes, chosen)
    if prefill is not None:
        reuse = (*(plan.reuse or ()), *(entry._replace(phase="prefill") for entry in plan.reuse or ()))
        plan = dataclasses.replace(plan, prefill=prefill, reuse=reuse)
    return dataclasses.replace(plan, notes=notes)


def _plan(policy: PageSparse, routes: Routes, anchors: Sequence[int]) -> Plan:
    return Plan(prefill=Dense(), decode=policy, reuse=routes.reuse(anchors))


def _budget(policy: PageSparse) -> tuple[int, list[int]]:
    keep, table, mass = policy.budget
    if mass or len(keep) != 1 or not policy.shareable:
        raise ValueError("policy must have one budget for all heads: a keep, pages or a schedule, no mass, list or completion")
    return share_bits(keep[0]), table


def widened(policy: PageSparse, selecting: float) -> PageSparse:
    """The policy whose `keep` reads, if a share `selecting` of the layers reads page means, as many bytes as if all did.

    A page's mean is a sixteenth of its keys, a thirty-second of keys and values. Policies of numbers of pages stay as they are.
    """
    share = policy.budget[0][0]
    if not share or not policy.by_means:
        return policy
    return dataclasses.replace(policy, keep=min(1.0, share + (1 - selecting) / (2 * PAGE)))


def _measured(
    model: nn.Module, texts: Sequence[Tensor], policy: PageSparse, widen_for: int | None, last: int, quantile: float, start: Start
) -> tuple[Routes, PageSparse]:
    """What the texts show, and the policy, whose `keep` is widened for so many layers that select, if any."""
    advance = start("similarity of layers", len(texts))
    similar, importance, paths, asked = [], [], [], policy
    for ids in texts:
        with recorded(model, last) as seen, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        paths = list(seen.masses)
        if len({x.shape for x in seen.masses.values()}) != 1:
            raise ValueError("layers with different numbers of KV heads share no selection")
        if widen_for is not None:
            policy = widened(asked, min(1.0, widen_for / len(paths)))
        share, table = _budget(policy)
        forced, wanted = _always_read(ids.shape[1], policy, share, table, last)
        masses = torch.stack(list(seen.masses.values()))
        similar.append(similarity(masses, forced.to(masses.device), wanted.to(masses.device), quantile).cpu())
        importance.append([seen.importance.get(path, 1.0) for path in paths])
        advance()
    return Routes(paths, torch.stack(similar).mean(0), torch.tensor(importance).mean(0)), policy


def _always_read(length: int, policy: PageSparse, share: int, table: list[int], last: int) -> tuple[Tensor, Tensor]:
    """For each of the last rows: pages that its step reads anyway, bool `[rows, pages]`, and how many others, int `[rows]`."""
    position = torch.arange(length - last, length)
    page, own = torch.arange(pages_of(length)), (position // PAGE)[:, None]
    forced = (page <= own) & ((page < policy.sinks) | (page > own - policy.recent))
    return forced, (budget(own[:, 0] + 1, share, table) - forced.sum(-1)).clamp(min=0)


def _by_loss(
    model: nn.Module, texts: Sequence[Tensor], policy: PageSparse, routes: Routes, anchors: int, last: int, start: Start
) -> tuple[list[int], float]:
    layers = len(routes.paths)
    decoder = TextDecoder(model, Plan(prefill=Dense(), decode=policy), last)
    trials = sum(range(anchors, layers))
    advance = start("loss of anchors", trials * len(texts))

    def loss(chosen: Sequence[int]) -> float:
        plan, found = _plan(policy, routes, chosen), []
        for ids in texts:
            found += decoder.compared(ids, plan, divergence)
            advance(f"{len(chosen)} anchors")
        return sum(found) / len(found)

    return greedy_anchors(layers, anchors, loss)


def divergence(dense: Tensor, sparse: Tensor) -> Tensor:
    """KL(dense || sparse) in nats, float32 `[...]`, of logits `[..., vocabulary]`."""
    p, q = (torch.log_softmax(logits.float(), -1) for logits in (dense, sparse))
    return (p.exp() * (p - q)).sum(-1)


def _similarities(routes: Routes, anchors: Sequence[int]) -> dict[str, float]:
    """Of each layer that reads another's lists: the mean over its heads."""
    nearest = ((b, max(a for a in anchors if a <= b)) for b in range(len(routes.paths)))
    return {routes.paths[b]: float(routes.similar[a, b].amax(-1).mean()) for b, a in nearest if a != b}
