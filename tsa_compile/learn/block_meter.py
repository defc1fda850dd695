"""Measures `BlockSparse` at any thresholds on one prompt: loss against the dense model, pairs read, errors by head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tsa_compile.check import compare_logits
from tsa_compile.learn.block_calls import BlockCall, Handle, handled
from tsa_compile.learn.output_errors import OutputErrors, output_weight
from tsa_compile.plan import Plan
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.session import Session

Tensor = torch.Tensor
Alphas = Mapping[str, Sequence[float]]  # by attention module, one number or one for each query head; a module without: dense


@dataclasses.dataclass(frozen=True)
class BlockSample:
    """One candidate on one prompt.

    Args:
        kl_end, kl_middle: mean KL(dense || sparse) in nats, of the predictions before the rows that the rule makes dense, and of
            those around the middle of the prompt. top1: share of both whose most likely token is the same.
        pairs: share of the causal query-key pairs that is read, mean over the heads of all layers that can be sparse.
    """

    kl_end: float
    kl_middle: float
    top1: float
    pairs: float

    @property
    def loss(self) -> float:
        """Mean of the two, in nats."""
        return (self.kl_end + self.kl_middle) / 2


class BlockMeter:
    """Runs one prompt at a time through one traced graph; candidates differ in what its attentions are told as they run.

    Args:
        model: in evaluation mode, left as it was.
        policy: what each attention gets, but for its alpha.
        last: predictions of each of the two stretches that are compared.
    """

    def __init__(self, model: nn.Module, policy: BlockSparse, last: int) -> None:
        self._model, self._policy, self._last = model, policy, last
        self._session = Session(model, Plan(prefill=policy))
        self.layers: list[str] = []  # attention modules, in the order in which they run
        self.heads: list[int] = []  # query heads of each
        self.lists: list[int] = []  # lists of each
        self.always_dense: dict[str, str] = {}  # module -> reason, for the sites that the policy does not take
        self.projected = True  # are errors by head those of the layers' outputs?

    def find_layers(self, inputs: Mapping[str, Any]) -> list[str]:
        """The attention modules that the policy takes, in their order; traces the model once.

        Raises:
            ValueError: there is none; the message has the reasons.
        """

        def look(number: int, call: BlockCall) -> Tensor:
            self.lists.append(call.lists)
            self.heads.append(call.q.shape[1])
            return call.dense()

        self._run(look, inputs)
        report = self._session.report
        self.layers = [site.module for site in report.replaced]
        self.always_dense = {site.module: site.reason for site in report.dense}
        if not self.layers:
            reasons = "; ".join(f"{m or 'site'}: {r}" for m, r in self.always_dense.items())
            raise ValueError(f"no attention site takes the policy ({reasons or 'none was found'})")
        self._check(len(self.heads))
        return self.layers

    def dense(self, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of both stretches, `[2 * last, vocabulary]`, of the model as it is."""
        return self._predict(self._model, inputs)

    def tables(self, inputs: Mapping[str, Any], alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(errors, pairs), float64 `[alphas, lists of all layers]` each, along one dense run.

        Errors are of the layers' outputs, squared, as shares of these (`OutputErrors`); of a list for several heads their sum.
        Pairs are shares of the causal ones.
        """
        errors: list[list[Tensor]] = [[] for _ in alphas]
        pairs: list[list[Tensor]] = [[] for _ in alphas]

        def look(number: int, call: BlockCall) -> Tensor:
            exact = call.dense()
            weight = output_weight(self._model, self.layers[number], exact.shape[1] * exact.shape[3])
            self.projected &= weight is not None
            against = OutputErrors(exact, weight)
            for at, wrong, read in zip(alphas, errors, pairs, strict=True):
                out, share = call.sparse([at])
                wrong.append(against.of(out).unflatten(0, (len(share), -1)).sum(1).double())
                read.append(share)
            return exact

        self._run(look, inputs)
        return torch.stack([torch.cat(e) for e in errors]).cpu(), torch.stack([torch.cat(p) for p in pairs]).cpu()

    def sample(self, inputs: Mapping[str, Any], dense: Tensor, alphas: Alphas) -> BlockSample:
        """The model under `alphas`, beside `dense`: its own logits of `inputs`."""
        pairs: list[float] = []

        def run(number: int, call: BlockCall) -> Tensor:
            alpha = alphas.get(self.layers[number])
            out, share = (call.dense(), torch.ones(1)) if alpha is None else call.sparse(alpha)
            pairs.append(share.mean().item() * self.heads[number])
            return out

        logits = self._run(run, inputs)
        self._check(len(pairs))
        end, middle = (compare_logits(*both) for both in zip(dense.chunk(2), logits.chunk(2), strict=True))
        return BlockSample(end.kl, middle.kl, (end.top1 + middle.top1) / 2, sum(pairs) / sum(self.heads))

    def compared_rows(self, length: int) -> list[int]:
        """Positions of the predictions that are compared: those before the rows that the rule makes dense, then the middle's.

        Raises:
            ValueError: the prompt is too short for both.
        """
        end, middle = self._policy.sparse_rows(length), (length - self._last) // 2
        if end - self._last < middle + self._last:
            raise ValueError(f"a prompt of {length} tokens is too short to compare two times {self._last} predictions")
        return [*range(end - self._last, end), *range(middle, middle + self._last)]

    def _run(self, handle: Handle, inputs: Mapping[str, Any]) -> Tensor:
        with handled(handle):
            return self._predict(self._session, inputs)

    def _check(self, calls: int) -> None:
        if calls != len(self.layers):
            raise RuntimeError(f"{calls} of {len(self.layers)} attentions ran by blocks: part of the model ran untraced")

    @torch.no_grad()
    def _predict(self, call: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
        rows = torch.tensor(self.compared_rows(inputs["input_ids"].shape[1]), device=inputs["input_ids"].device)
        some = "logits_to_keep" in inputs
        output = call(**{**inputs, **({"logits_to_keep": rows} if some else {})})
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise TypeError(f"calibrate needs a model that returns logits or has them as .logits, got {type(output).__name__}")
        return logits[0] if some else logits[0, rows]
