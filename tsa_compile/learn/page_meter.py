"""Measures `PageSparse` at any budgets on one text: loss against the dense model, pages read, errors by KV head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from tsa_compile.learn.output_errors import output_weight
from tsa_compile.learn.page_calls import PageCall, handled
from tsa_compile.learn.text_decoder import TextDecoder
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.page_sparse import PageSparse

Tensor = torch.Tensor
Keeps = Mapping[str, Sequence[float]]  # by attention module, a share for each KV head; a module without: every page


@dataclasses.dataclass(frozen=True)
class PageSample:
    """One candidate on one text.

    Args:
        kl, worst: KL(dense || sparse) in nats of the predictions after the decoded tokens, their mean and the largest.
        top1: share of them whose most likely token is the same.
        pages: share of the row's pages that is read, mean over steps, layers and KV heads.
    """

    kl: float
    worst: float
    top1: float
    pages: float


class PageMeter:
    """Decodes the end of one text at a time through one graph; candidates differ in what its attentions are told as they run.

    Args:
        model: a transformers model in evaluation mode, left as it was.
        policy: what each attention gets, but for its budget.
        last: tokens that are decoded.
    """

    def __init__(self, model: nn.Module, policy: PageSparse, last: int) -> None:
        self._model, self._policy, self._last = model, policy, last
        self._plan = Plan(prefill=Dense(), decode=policy)
        self._decoder = TextDecoder(model, self._plan, last, recorded=False)
        self.layers: list[str] = []  # attention modules, in the order in which they run
        self.lists: list[int] = []  # KV heads of each
        self.always_exact: dict[str, str] = {}  # module -> reason, for the sites that the policy does not take
        self.projected = True  # are errors by head those of the layers' outputs?

    def find_layers(self, ids: Tensor) -> list[str]:
        """The attention modules that the policy takes, in their order; traces the model once.

        Raises:
            ValueError: there is none; the message has the reasons.
        """

        def look(number: int, call: PageCall) -> Tensor:
            self.lists.append(call.lists)
            return call.exact()

        self._run(look, ids)
        sites = [site for site in self._decoder.report.sites if site.policy == self._policy.name]
        self.layers = list(dict.fromkeys(site.module for site in sites if site.replaced))
        self.always_exact = {site.module: site.reason for site in sites if not site.replaced}
        if len(self.lists) != len(self.layers) * self._last:
            raise RuntimeError(
                f"{len(self.lists)} attentions of {self._last} steps ran by pages, expected {len(self.layers)} each"
            )
        del self.lists[len(self.layers) :]
        return self.layers

    def tables(self, ids: Tensor, keeps: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(errors, shares of the pages read) of an exact run, float64 `[keeps, KV heads of all layers]` each, means over steps.

        An error is the square of what a KV head's query heads change in the layer's output (behind the projection), over that of
        the output.
        """
        errors = [[torch.zeros(n, dtype=torch.float64) for n in self.lists] for _ in keeps]
        read = [[torch.zeros(n, dtype=torch.float64) for n in self.lists] for _ in keeps]

        def look(number: int, call: PageCall) -> Tensor:
            layer = number % len(self.layers)
            exact = call.exact()
            weight = output_weight(self._model, self.layers[layer], exact.shape[1] * exact.shape[3])
            self.projected &= weight is not None
            found = [call.sparse([keep]) for keep in keeps]
            wrong = changed(torch.stack([out for out, _ in found]), exact, weight, call.lists).double().cpu() / self._last
            for n, share in enumerate(torch.stack([share for _, share in found]).double().cpu() / self._last):
                errors[n][layer] += wrong[n]
                read[n][layer] += share
            return exact

        self._run(look, ids)
        return torch.stack([torch.cat(e) for e in errors]), torch.stack([torch.cat(r) for r in read])

    def sample(self, ids: Tensor, keeps: Keeps) -> PageSample:
        """The model under `keeps`."""
        shares: list[Tensor] = []

        def run(number: int, call: PageCall) -> Tensor:
            keep = keeps.get(self.layers[number % len(self.layers)])
            if keep is None:
                shares.append(torch.ones(call.lists))
                return call.exact()
            out, share = call.sparse(keep)
            shares.append(share)
            return out

        kl, same = self._run(run, ids)
        pages = torch.cat([share.float().cpu() for share in shares]).mean().item()
        return PageSample(sum(kl) / len(kl), max(kl), sum(same) / len(same), pages)

    def whole(self, ids: Tensor, plan: Plan) -> tuple[float, float]:
        """(mean KL, largest) under a plan as `transform` runs it."""
        kl, _ = self._compared(ids, plan)
        return sum(kl) / len(kl), max(kl)

    def _run(self, handle: Callable[[int, PageCall], Tensor], ids: Tensor) -> tuple[list[float], list[bool]]:
        with handled(handle, self._policy.completion):
            return self._compared(ids, self._plan)

    def _compared(self, ids: Tensor, plan: Plan) -> tuple[list[float], list[bool]]:
        same: list[bool] = []

        def measure(dense: Tensor, sparse: Tensor) -> Tensor:
            same.append(bool(dense.argmax() == sparse.argmax()))
            p, q = (torch.log_softmax(logits.float(), -1) for logits in (dense, sparse))
            return (p.exp() * (p - q)).sum()

        return self._decoder.compared(ids, plan, measure), same


def changed(outs: Tensor, exact: Tensor, weight: Tensor | None, lists: int) -> Tensor:
    """Squares of what each KV head's query heads change in the projected output, over that of the output: float32 `[n, Hk]`.

    Args:
        outs: `[n, 1, H, 1, Dv]`. exact: `[1, H, 1, Dv]`.
        weight: `[width, H * Dv]`, of the projection; None: heads count as they are.
    """
    right = exact[0, :, 0].float()  # [H, Dv]
    wrong = (outs[:, 0, :, 0].float() - right).unflatten(1, (lists, -1)).flatten(2)  # [n, Hk, G * Dv]
    whole = right.flatten()
    if weight is not None:
        parts = weight.float().unflatten(1, (lists, -1))  # [width, Hk, G * Dv]
        wrong, whole = torch.einsum("ngc,wgc->ngw", wrong, parts), weight.float() @ whole
    return wrong.square().sum(-1) / whole.square().sum()
