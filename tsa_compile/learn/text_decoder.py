"""Decodes the end of a text token by token under a plan, beside what the dense model says when it reads the text at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tsa_compile.cache import Cache
from tsa_compile.cache.names import cache_name
from tsa_compile.learn.model_inputs import as_inputs
from tsa_compile.plan import Plan
from tsa_compile.report import Report
from tsa_compile.session import Session

Tensor = torch.Tensor


class TextDecoder:
    """Keeps what the dense model says of the latest text, and the cache of its beginning.

    Args:
        model: a transformers model in evaluation mode, which is left as it was.
        plan: the first one that runs; no other one is traced anew.
        last: tokens at the end of a text that are decoded.
        recorded: may steps be replayed by CUDA graphs, which run no Python?

    Raises:
        ValueError: the model is in training mode, transformed or compiled, or takes no cache.
    """

    def __init__(self, model: nn.Module, plan: Plan, last: int, recorded: bool = True) -> None:
        if model.training or model._compiled_call_impl is not None:
            raise ValueError(
                "the model is in training mode, transformed or compiled: call model.eval(), tsa_compile.restore(model)"
            )
        found = cache_name(model)
        if found is None:
            raise ValueError(f"{type(model).__name__} takes no cache of transformers (past_key_values)")
        self._model, self._last, self._cache_name = model, last, found
        self._session = Session(model, plan)
        if not recorded:
            self._session.steps.recorded_on = frozenset()
        self._text: Tensor | None = None
        self._dense: Tensor = torch.empty(0)
        self._cache: Any = None

    @property
    def report(self) -> Report:
        """Of the session in which it decodes."""
        return self._session.report

    @torch.no_grad()
    def compared(self, ids: Tensor, plan: Plan, measure: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        """`measure(dense, sparse)` of the logits `[vocabulary]` after each of the last tokens of `ids` `[1, L]`.

        Raises:
            ValueError: no decode step took the plan's policy, so that nothing sparse was measured.
        """
        self._session.plan = plan
        first = ids.shape[1] - self._last
        if self._text is not ids:
            self._dense = self._model(input_ids=ids, use_cache=False, logits_to_keep=self._last).logits[0]
            self._cache, self._text = Cache(self._model, 1, ids.shape[1]), ids
            self._call(ids[:, :first])
        found = [float(measure(self._dense[n], self._call(ids[:, first + n : first + n + 1]))) for n in range(self._last)]
        self._cache.crop(-self._last)
        self._check(plan)
        return found

    def _call(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._session(input_ids=ids, **{self._cache_name: self._cache}).logits[0, -1]
        return logits

    def _check(self, plan: Plan) -> None:
        name = "" if plan.decode is None else plan.decode.name
        decode = [site for site in self._session.report.sites if site.policy == name]
        if not any(site.replaced for site in decode):
            reasons = "; ".join(f"{site.module or 'site'}: {site.reason}" for site in decode) or "none was found"
            raise ValueError(f"no attention of a decode step takes {name} ({reasons})")


def texts_of(model: nn.Module, prompts: Iterable[Any], last: int) -> list[Tensor]:
    """Token ids `[1, L]` on the model's device, each text longer than the `last` tokens that are decoded.

    Raises:
        ValueError: `last` below 1, no text, one that is too short or no row of token ids.
    """
    if last < 1:
        raise ValueError(f"last must be at least 1, got {last}")
    texts: list[Tensor] = [given["input_ids"] for given in as_inputs(model, prompts, last, 0)]
    for n, ids in enumerate(texts):
        if ids.shape[1] <= last:
            raise ValueError(f"prompt {n} has {ids.shape[1]} tokens, of which the last {last} are decoded: give longer ones")
    return texts
