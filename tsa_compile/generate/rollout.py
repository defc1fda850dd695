"""Rollouts for reinforcement learning: many samples of many prompts, decoded under a sparse policy, scored by the dense model.

Sparrow (arXiv 2606.08446): decode reads pages by a schedule, and training is corrected by the ratio of both policies'
probabilities (`rl/corrections.py`). The model is not transformed: its own calls, as training makes them, stay as they are.
Weights are read where they lie, so each rollout is of the model as it is then, and nothing is compiled or recorded anew for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tsa_compile.cache.names import cache_name
from tsa_compile.dynamo import called
from tsa_compile.generate.rollout_batch import Drawing, RolloutBatch
from tsa_compile.generate.scoring import score
from tsa_compile.plan import Plan
from tsa_compile.report import Report
from tsa_compile.session import Session

Tensor = torch.Tensor


class Rollout(NamedTuple):
    """N = prompts x samples sequences, all samples of a prompt one after another; T tokens in the longest.

    Args:
        tokens: int64 `[N, T]`, 0 behind the end.
        lengths: int64 `[N]`, tokens of each, one that ends it included.
        starts: int64 `[N]`, tokens of its prompt.
        sparse: float32 `[N, T]`, log-probabilities of the tokens under the policy that drew them; 0 behind the end.
        dense: the same under the model itself.
        accepted: float32 `[N, T]`, what both distributions have in common (`scoring.common_mass`); 0 behind the end.
        steps: decode steps of the whole batch.
        busy: the share of their rows that drew a token of a sample; others had ended.
    """

    tokens: Tensor
    lengths: Tensor
    starts: Tensor
    sparse: Tensor
    dense: Tensor
    accepted: Tensor
    steps: int
    busy: float

    @property
    def mask(self) -> Tensor:
        """bool `[N, T]`: is it a token of the sample?"""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def positions(self) -> Tensor:
        """int64 `[N, T]`: of each token in its sequence, the prompt included."""
        return self.starts[:, None] + torch.arange(self.tokens.shape[1], device=self.tokens.device)


class Rollouts:
    """Rollouts of one model, as often as its weights change; keep it, as graphs and recorded steps are its own.

    Args:
        model: a decoder of transformers with sdpa attention, or a PEFT wrapper of one; not transformed.
        plan: with a policy for decode, such as `learn.gate.schedule_plan("sparrow-8b-0.86")` makes. It can be assigned to later.
        batch: sequences that are decoded together; a row whose sample has ended gets the next one.
        temperature: tokens are drawn from the whole softmax of logits / temperature: with a cut one (top-k, top-p) the ratio of
            two policies would not exist where one of them cuts.
        ends: tokens that end a sample.
        top: likeliest tokens that are kept to compare both distributions.
        look_every: steps between two looks at which rows have ended; each look waits for the device.
        rows_at_once: sequences of one prefill, and of one scoring pass.
        keep_cache: keep the cache's memory for the next rollout, whose steps then need not be recorded anew.
        compiler: as of `transform`.
        decoding: what is to be in force while tokens are drawn, and not while they are scored (`rl.distill`).

    Raises:
        ValueError: a number is out of range, the plan has no policy for decode, or the model is transformed or takes no cache.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        batch: int = 32,
        temperature: float = 1.0,
        ends: Sequence[int] = (),
        top: int = 20,
        look_every: int = 16,
        rows_at_once: int = 4,
        keep_cache: bool = True,
        compiler: str = "eager",
        decoding: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        for name, n in (("batch", batch), ("top", top), ("look_every", look_every), ("rows_at_once", rows_at_once)):
            _check_count(name, n)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        if model._compiled_call_impl is not None or called(model)._compiled_call_impl is not None:
            raise ValueError("the model is transformed or compiled; training needs it as it is: tsa_compile.restore(model)")
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            raise ValueError("adapters that are prompts live in the wrapper of PEFT, which decode steps go around: train LoRA")
        self.model: Any = called(model)
        if cache_name(self.model) is None:
            raise ValueError(f"{type(self.model).__name__} takes no cache of transformers (past_key_values)")
        self.session = Session(model, plan, compiler)
        self._given: Plan | None = None
        self._checked: Plan | None = None
        self.plan = plan
        self.batch, self.temperature, self.ends, self.top = batch, temperature, tuple(ends), top
        self.look_every, self.rows_at_once, self.decoding = look_every, rows_at_once, decoding
        self.keep_cache = keep_cache

    @property
    def plan(self) -> Plan:
        """What decodes; steps that were recorded under it stay as long as it is not another one."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if not plan.decodes:
            raise ValueError("the plan must name a policy for decode steps")
        if plan is not self._given:
            self._given, self._plan = plan, plan.bind(self.model)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        samples: int = 1,
        *,
        new_tokens: int,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """Draw `samples` continuations of each prompt, and score them.

        Args:
            prompts: token ids, without padding. Equal ones are read once.
            samples: of each prompt.
            new_tokens: of each sample, at most.
            generator: on the model's device; None: torch's own.

        Raises:
            ValueError: no prompt, an empty one, a number below 1, or a model whose decode steps cannot be sparse; it says why.
        """
        _check_count("samples", samples)
        _check_count("new_tokens", new_tokens)
        device = next(self.model.parameters()).device
        rows = _as_rows(prompts, samples, device)
        how = Drawing(self.temperature, self.ends, self.top, self.look_every, self.rows_at_once, generator)
        with untrained(self.model):
            with self.decoding(), self.session.backend.under(self.plan):
                batch = RolloutBatch(self.model, self.session, rows, self.batch, new_tokens, how)
                batch.run()
                if batch.steps and self._checked is not self.plan:
                    self._check_sparse()
            if not self.keep_cache:
                self.session.steps.pool.clear()
            lengths = batch.slots.lengths[: len(rows)]
            tokens, sparse, top, names = (x[: len(rows), : int(lengths.max())] for x in batch.slots.drawn)
            how_many = self.rows_at_once
            dense = score(self.model, rows, tokens, lengths, top, names, temperature=self.temperature, rows=how_many)
        busy = float((lengths - 1).sum()) / max(1, batch.steps * batch.batch)
        starts = torch.tensor([len(p) for p in rows], device=device)
        return Rollout(tokens, lengths, starts, sparse, dense.logps, dense.accepted, batch.steps, busy)

    @property
    def report(self) -> Report:
        """Which attention takes the plan's policy, and how steps ran, as `tsa_compile.report` has it."""
        return self.session.report

    def _check_sparse(self) -> None:
        """An error if no attention of a decode step took the plan's policy."""
        rules = [rule.policy for rule in self.plan.rules if rule.phase == "decode"]
        names = {p.name for p in (self.plan.decode, *rules) if p is not None}
        sites = [site for site in self.report.sites if site.policy in names]
        if not any(site.replaced for site in sites):
            reasons = "; ".join(sorted({f"{site.module or 'site'}: {site.reason}" for site in sites})) or "none was found"
            raise ValueError(f"no attention of a decode step takes {' or '.join(sorted(names))} ({reasons})")
        self._checked = self.plan


@contextlib.contextmanager
def untrained(model: Any) -> Iterator[None]:
    """Inside, no module of the model is in training mode, and no hook makes its embeddings require gradients, as gradient
    checkpointing of transformers has it (more of them at each rollout of TRL, for each of which steps would be traced anew)."""
    training = [module for module in model.modules() if module.training]
    hooks = model.get_input_embeddings()._forward_hooks
    stashed = {key: hook for key, hook in hooks.items() if getattr(hook, "__name__", "") == "make_inputs_require_grads"}
    for module in training:
        module.training = False
    for key in stashed:
        del hooks[key]
    try:
        yield
    finally:
        hooks.update(stashed)
        for module in training:
            module.training = True


def _as_rows(prompts: Sequence[Sequence[int] | Tensor], samples: int, device: torch.device) -> list[Tensor]:
    """The prompt of each sample, int64 `[L]`; equal prompts are the same tensor."""
    known: dict[tuple[int, ...], Tensor] = {}
    keys = [tuple(p.tolist()) if isinstance(p, Tensor) else tuple(p) for p in prompts]
    if not keys or not all(keys):
        raise ValueError("prompts must be one or more, each with a token")
    for key in keys:
        if key not in known:
            known[key] = torch.tensor(key, dtype=torch.int64, device=device)
    return [known[key] for key in keys for _ in range(samples)]


def _check_count(name: str, number: int) -> None:
    if type(number) is not int or number < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {number!r}")
