"""What `self_distill.py` trains, and how: an adapter by KL(dense || sparse) at the last tokens of one text at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tsa_compile.learn.adapter import ATTENTION, Adapter
from tsa_compile.learn.sparse_rows import sparse_logits
from tsa_compile.plan import Plan
from tsa_compile.policies.base import check_int

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How an adapter is trained.

    Args:
        rank, targets: of the LoRA weights; linear layers by the end of their names.
        likeliest: tokens of the teacher that are told apart; published: 10.
        steps: last tokens of a text that are read as decode steps, and have a loss.
        epochs: times that each text is read; an update for each.
        lr: of AdamW, after a warm-up of a tenth of the updates, falling to 0 as a cosine; gradients are cut to a norm of 1.
        seed: of the first weights.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    rank: int = 16
    targets: tuple[str, ...] = ATTENTION
    likeliest: int = 10
    steps: int = 256
    epochs: int = 1
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "likeliest", "steps", "epochs"):
            check_int(self, name, 1)
        if not self.lr > 0:
            raise ValueError(f"Distillation.lr must be above 0, got {self.lr}")


class Learner:
    """The adapter, and what trains it."""

    def __init__(self, model: nn.Module, plan: Plan, recipe: Distillation) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            self.adapter = Adapter(model, recipe.rank, recipe.targets)
        self._model: Any = model
        self._plan, self._recipe = plan, recipe
        self._optimizer = torch.optim.AdamW(self.adapter.parameters, lr=recipe.lr, weight_decay=0.0)

    def loss(self, ids: Tensor, on: bool = True) -> Tensor:
        """KL of the teacher and the student, with the adapter `on` or off, on a text `[1, L]`, in nats a token."""
        steps, (_, length) = self._recipe.steps, ids.shape
        with torch.no_grad():
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=steps + 1).logits[0].float()
            names = logits.topk(self._recipe.likeliest).indices
            teacher = told_apart(logits, names)
        positions = torch.arange(length, device=ids.device)[None]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        with self.adapter.on() if on else contextlib.nullcontext():
            student = told_apart(sparse_logits(self._model, given, length - steps, self._plan)[0].float(), names)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

    def update(self, ids: Tensor, rate: float) -> list[float]:
        """The loss before the update."""
        with torch.enable_grad():
            loss = self.loss(ids)
            with self.adapter.on():  # what is off has no gradients
                grads = torch.autograd.grad(loss, self.adapter.parameters)
        for p, grad in zip(self.adapter.parameters, grads, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters, 1.0)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        return [float(loss.detach())]

    @torch.no_grad()
    def measured(self, texts: Sequence[Tensor]) -> dict[str, float]:
        """The mean loss on other texts, without and with the adapter; nothing of no texts."""
        ways = {"without adapter": False, "with adapter": True} if texts else {}
        return {name: round(float(torch.stack([self.loss(x, on) for x in texts]).mean()), 5) for name, on in ways.items()}

    def state(self) -> dict[str, Any]:
        return {"weights": self.adapter.state(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.adapter.load(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])


def told_apart(logits: Tensor, names: Tensor) -> Tensor:
    """Log-probabilities `[n, k + 1]` of the tokens `names` `[n, k]`, and of all others as if they were one; logits `[n, V]`."""
    total = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, names, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, names), others], -1) - total
