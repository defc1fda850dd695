"""DistillSparse (Sparrow, arXiv 2606.08446): LoRA weights that only the sparse policy has, trained to bring it to the dense one.

They are on while tokens of a rollout are drawn, and off in everything else: in the scoring pass, and in the policy that is
trained. After each rollout, with the model's own weights as they are, one step on L_PPO(sparse) + weight * KL(dense || sparse).
A cheaper schedule then stays as close as a dearer one. The paper says neither which way KL goes, nor its weight, nor the rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from tsa_compile.generate.rollout import Rollout, untrained
from tsa_compile.generate.scoring import behind
from tsa_compile.learn.adapter import ATTENTION, Adapter
from tsa_compile.learn.sparse_rows import sparse_logits
from tsa_compile.plan import Plan

Tensor = torch.Tensor


class SparseAdapter:
    """Put into a model before its trainer is made; give it to `SparseRollouts(adapter=...)`. `remove` undoes that.

    Args:
        model: a decoder of transformers, all of whose weights may be trained; not a wrapper of PEFT.
        rank, targets: of the LoRA weights.
        weight: of KL(dense || sparse).
        lr: of the adapter's AdamW.
        clip: below and above 1, of the ratio in L_PPO.
        rows_at_once: sequences of one pass.

    Raises:
        ValueError: the model has adapters already, or none of the targets.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 16,
        targets: Sequence[str] = ATTENTION,
        weight: float = 1.0,
        lr: float = 1e-4,
        clip: tuple[float, float] = (0.2, 0.28),
        rows_at_once: int = 1,
    ) -> None:
        self._lora = Adapter(model, rank, targets)
        self._lora.thaw()
        self.parameters = self._lora.parameters
        self.model, self.weight, self.clip, self.rows_at_once = model, weight, clip, rows_at_once
        self._optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, the adapter is on."""
        with self._lora.on():
            yield

    def learn(
        self, found: Rollout, prompts: Tensor, mask: Tensor, advantages: Tensor, plan: Plan, temperature: float = 1.0
    ) -> dict[str, float]:
        """One step; returns the two terms of the loss, means over tokens.

        Args:
            found: of the sparse policy as it is now.
            prompts, mask: int64 `[N, L]`, padded at the left to the longest, as the rollout had them.
            advantages: float `[N]`.
            plan: of the rollout, bound to the model.
        """
        total, sums = found.lengths.sum(), torch.zeros(2, device=prompts.device)
        self._optimizer.zero_grad()
        with untrained(self.model):
            for begin in range(0, len(prompts), self.rows_at_once):
                part = slice(begin, begin + self.rows_at_once)
                drawn, there = found.tokens[part], found.mask[part]
                given = behind(prompts[part], mask[part], drawn, there)
                terms = self._terms(given, drawn, there, found.sparse[part], advantages[part, None], plan, temperature)
                with self.decoding():
                    grads = torch.autograd.grad((terms[0] + self.weight * terms[1]) / total, self.parameters)
                for p, grad in zip(self.parameters, grads, strict=True):
                    p.grad = grad if p.grad is None else p.grad + grad
                sums += torch.stack([term.detach() for term in terms])
        self._optimizer.step()
        ppo, kl = (sums / total).tolist()
        return {"ppo": ppo, "kl": kl}

    def _terms(
        self, given: dict[str, Tensor], drawn: Tensor, there: Tensor, then: Tensor, advantages: Tensor, plan: Plan, t: float
    ) -> tuple[Tensor, Tensor]:
        """L_PPO of the sparse policy, and KL(dense || sparse), sums over the tokens that are `there`."""
        first = given["input_ids"].shape[1] - drawn.shape[1]
        with torch.no_grad():
            dense = self.model(**given, use_cache=False, logits_to_keep=drawn.shape[1] + 1).logits[:, :-1]
            p = torch.log_softmax(dense.float() / t, -1)
        with self.decoding(), torch.enable_grad():
            q = torch.log_softmax(sparse_logits(self.model, given, first, plan)[:, :-1].float() / t, -1)
            ratio = (q.gather(2, drawn[..., None])[..., 0] - then).exp()
            clipped = ratio.clamp(1 - self.clip[0], 1 + self.clip[1])
            ppo = -torch.minimum(ratio * advantages, clipped * advantages)
            kl = (p.exp() * (p - q)).sum(-1)
        return (ppo * there).sum(), (kl * there).sum()

    def remove(self) -> None:
        """The model as it was; the adapter's weights are lost."""
        self._lora.remove()
