"""Runs a causal language model of transformers: prefill under a plan, decode dense, logits only where they are needed."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile.parallel import head_group
from tsa_compile.plan import Plan
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.recorder import record_kept
from tsa_compile.rules import layer_number
from tsa_compile.session import Session
from tsa_compile.tools.evaluate.causal_lm import CausalLM
from tsa_compile.traced import LATE

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Prefill:
    """What a prefill of ids [B, L] left: hidden states [B, L, D], the cache, its time, and kept shares by layer."""

    hidden: Tensor
    cache: Any
    seconds: float
    kept: dict[int, float]


class Runner(CausalLM):
    """One model under many plans of prefill."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.widest = Plan(TokenSparse())
        self._session = Session(self.decoder, self.widest)
        self._group = head_group(model)
        self._path = next((name for name, module in model.named_modules() if module is self.decoder), "")

    def find_layers(self, ids: Tensor) -> dict[int, str]:
        """Layer -> path of its attention module, for every layer that can be sparse."""
        self.prefill(ids, self.widest)
        return {site.layer: site.module for site in self._session.report.replaced}

    @torch.no_grad()
    def prefill(self, ids: Tensor, plan: Plan | None, cache: Any = None, mask: Tensor | None = None) -> Prefill:
        """Run `plan` on ids [B, L]; with a cache (which grows), they come after what it holds. None: the model, not traced.

        Args:
            mask: [B, L], 0 at padding, which stands in front; only without a cache.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.decoder.config) if cache is None else cache
        call, padding = self.decoder, {}
        if mask is not None:
            padding = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        if plan is not None:
            _mark_lengths(ids, cache, *padding.values())
            self._session.plan, call = inside(plan, self._path), self._session
        self.wait()
        start = time.perf_counter()
        with record_kept(self.decoder, self._group) as kept:
            hidden = call(input_ids=ids, past_key_values=cache, use_cache=True, **padding).last_hidden_state
        self.wait()
        seconds = time.perf_counter() - start
        shares = {layer_number(module) or 0: share for module, share in kept.by_module()}
        if self._session.untraced:
            raise RuntimeError("a prefill ran untraced: Dynamo's recompile limit?")
        if plan is not None and any(site.reason == LATE for site in self._session.report.sites):
            raise RuntimeError(f"a prefill ran dense: {LATE}")
        return Prefill(hidden, cache, seconds, shares)

    @torch.no_grad()
    def decode(self, prefill: Prefill, new_tokens: int) -> list[list[int]]:
        """Greedy continuation, dense; the prefill's cache grows."""
        hidden, out = prefill.hidden, []
        for step in range(new_tokens):
            out.append(self.logits(hidden[:, -1:]).argmax(-1))
            if step + 1 < new_tokens:
                hidden = self.decoder(input_ids=out[-1], past_key_values=prefill.cache, use_cache=True).last_hidden_state
        tokens: list[list[int]] = torch.cat(out, 1).tolist()
        return tokens

    @torch.no_grad()
    def answer_losses(self, prefill: Prefill, answers: list[list[int]]) -> list[float]:
        """Mean negative log-likelihood in nats of each answer's tokens after the prefill, dense; the cache stays as it is."""
        longest = max(map(len, answers))
        ids = torch.tensor([a + [0] * (longest - len(a)) for a in answers], device=self.device)
        cache = copy.deepcopy(prefill.cache)
        after = self.decoder(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
        logits = self.logits(torch.cat((prefill.hidden[:, -1:], after), 1)).float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").tolist()
        return [sum(row[: len(a)]) / len(a) for row, a in zip(losses, answers, strict=True)]


def inside(plan: Plan, path: str) -> Plan:
    """The plan of a model for its submodule at `path` alone: patterns of rules below it, without it."""
    if not path:
        return plan
    begins = [isinstance(rule.modules, str) and rule.modules.startswith(f"{path}.") for rule in plan.rules]
    cut = (
        rule._replace(modules=str(rule.modules).removeprefix(f"{path}.")) if below else rule
        for rule, below in zip(plan.rules, begins, strict=True)
    )
    return dataclasses.replace(plan, rules=tuple(cut))


def _mark_lengths(ids: Tensor, cache: Any, *padding: Tensor) -> None:
    """One graph for all batches and lengths, rather than one for the first and another for the others."""
    for x in (ids, *padding):
        torch._dynamo.maybe_mark_dynamic(x, [0, 1])
    for layer in cache.layers:
        for states in (layer.keys, layer.values) if layer.is_initialized else ():
            torch._dynamo.maybe_mark_dynamic(states, [0, 2])
