"""Runs a causal language model of transformers: dense prefills, then decode steps under a plan, timed or counted."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from tsa_compile.cache import Cache
from tsa_compile.cache.names import cache_name
from tsa_compile.cache.rows import Rows
from tsa_compile.cuda_graphs import CudaReplay
from tsa_compile.plan import Plan
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.recorder import around_graphs
from tsa_compile.session import Session
from tsa_compile.tools.evaluate.causal_lm import CausalLM
from tsa_compile.tools.evaluate.decode_bytes import Traffic

Tensor = torch.Tensor
DENSE_PLAN = Plan(prefill=Dense(), decode=Exact())


@dataclasses.dataclass
class Request:
    """A batch of prompts that were read, and goes on token by token.

    Args:
        cache: ours, with the prompts' rows.
        mask: int `[B, rows]`, 0 at padding, which stands in front; None: there is none.
    """

    cache: Any
    mask: Tensor | None

    def copied(self) -> Request:
        """The same prompts, in a cache of its own; nothing that a policy keeps is copied before its first step."""
        return Request(copy.deepcopy(self.cache), self.mask)


class DecodeRunner(CausalLM):
    """One model under many plans of decode: `use` one, then `step`.

    Raises:
        TypeError: not a causal language model of transformers, or one that takes no cache.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        names = [cache_name(part) for part in (self.model, self.decoder)]
        if None in names:
            raise TypeError(f"{type(model).__name__} takes no cache of transformers")
        self._cache_name, self._of_decoder = names
        self.session = Session(model, DENSE_PLAN)

    def use(self, plan: Plan) -> None:
        """Steps from now on run under this plan."""
        self.session.plan = plan

    @torch.no_grad()
    def hidden(self, ids: Tensor, last: int) -> Tensor:
        """Hidden states `[B, last, D]` of the last tokens of ids `[B, L]`, by the model as it is."""
        states: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states[:, -last:].clone()

    @torch.no_grad()
    def prefill(self, ids: Tensor, room: int, mask: Tensor | None = None) -> Request:
        """Read ids `[B, L]` by the model as it is, into a cache with room for `room` tokens more."""
        cache, padding = Cache(self.model, ids.shape[0], ids.shape[1] + room), {}
        if mask is not None:
            padding = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        self.decoder(input_ids=ids, use_cache=True, **{str(self._of_decoder): cache}, **padding)
        return Request(cache, mask)

    @torch.no_grad()
    def step(self, tokens: Tensor, request: Request) -> Tensor:
        """One more token of each row, `[B, 1]`, under the plan: logits `[B, 1, vocabulary]`."""
        padding = {}
        if request.mask is not None:
            request.mask = torch.cat((request.mask, request.mask.new_ones(len(tokens), 1)), 1)
            padding = {"attention_mask": request.mask, "position_ids": request.mask.sum(1, keepdim=True) - 1}
        tokens = tokens.clone(memory_format=torch.contiguous_format)  # strides of a slice would have a graph of their own
        output = self.session(input_ids=tokens, use_cache=True, **{str(self._cache_name): request.cache}, **padding)
        if self.session.untraced:
            raise RuntimeError("a step ran untraced, dense: Dynamo's recompile limit?")
        logits: Tensor = output.logits
        return logits

    @contextlib.contextmanager
    def counted(self, request: Request) -> Iterator[Traffic]:
        """Inside, steps are not replayed, and what they read is counted.

        Raises:
            RuntimeError: on leaving, an attention of a layer that keeps all rows did not run under the plan.
        """
        traffic, steps = Traffic(), self.session.steps
        before, rows = steps.recorded_on, request.cache.get_seq_length()
        steps.recorded_on = frozenset()
        try:
            with around_graphs(lambda: traffic):
                yield traffic
        finally:
            steps.recorded_on = before
        layers = sum(isinstance(layer, Rows) for layer in request.cache.layers)
        expected = layers * (request.cache.get_seq_length() - rows)
        if traffic.attentions < expected:
            raise RuntimeError(f"{traffic.attentions} attentions ran under the plan, not {expected} or more: {self._dense()}")

    def _dense(self) -> str:
        reasons = {f"{site.module}: {site.reason}" for site in self.session.report.dense if site.q_len == "1"}
        return "; ".join(sorted(reasons)) or "no site was found"

    def replays(self, request: Request) -> list[CudaReplay]:
        """The CUDA graphs that steps over this cache were recorded in."""
        storage = request.cache.layers[0].storage
        found = [recording.replay for recording in self.session.steps.recordings.of(storage)]
        return [replay for replay in found if isinstance(replay, CudaReplay)]
