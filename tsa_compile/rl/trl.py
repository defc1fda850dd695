"""Sparse rollouts in TRL: `GRPOTrainer(rollout_func=SparseRollouts(...))`, and the trainer's loss corrected for them.

    class Trainer(SparseGRPO, GRPOTrainer): ...

    rollouts = SparseRollouts(RolloutGate("sparrow-8b-0.86"))
    trainer = Trainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=..., rollout_func=rollouts)

`rollout_func` is TRL's hook for completions made elsewhere; what it has no hook for are the weights of their tokens, which
`SparseGRPO` multiplies into the advantages. The trainer's own calls of the model are not touched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tsa_compile.generate.rollout import Rollout, Rollouts
from tsa_compile.learn.gate import pages_read
from tsa_compile.plan import Plan
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.rl.corrections import CAP, importance_weights
from tsa_compile.rl.rollout_gate import RolloutGate

if TYPE_CHECKING:
    from tsa_compile.rl.distill import SparseAdapter

Tensor = torch.Tensor
#: Of a `GRPOConfig`: what would cut the distribution that tokens are drawn from, and the value at which it does not.
WHOLE = {"top_p": (1.0,), "top_k": (0, None), "min_p": (0.0, None), "repetition_penalty": (1.0,)}


class SparseRollouts:
    """What `GRPOTrainer(rollout_func=...)` takes. One of it serves one trainer.

    Args:
        decode: a gate, which may change the plan after each rollout, or a plan that stays.
        cap, level, drop: of the weights; see `corrections.importance_weights`. `cap=None`: no weights.
        adapter: LoRA weights that only the sparse policy has (`rl.distill`); it needs `SparseGRPO`.
        options: of `generate.rollout.Rollouts`, such as `batch`; temperature and ends are the trainer's.

    Attributes:
        history: what each rollout in training came to, a dict each time; also in the trainer's logs, under "rollout/".
        rollouts: of the trainer's model, from the first one on; `rollouts.report` says what is sparse. An error before.
        last: the latest rollout. weights: float32 `[N, T]`, of its tokens.
    """

    def __init__(
        self,
        decode: RolloutGate | Plan,
        *,
        cap: float | None = CAP,
        level: str = "token",
        drop: bool = False,
        adapter: SparseAdapter | None = None,
        **options: Any,
    ) -> None:
        self.gate = decode if isinstance(decode, RolloutGate) else None
        self._plan = decode.plan if isinstance(decode, RolloutGate) else decode
        self.cap, self.level, self.drop, self.adapter, self._options = cap, level, drop, adapter, options
        self._rollouts: Rollouts | None = None
        self.history: list[dict[str, float | str]] = []
        self.last: Rollout | None = None
        self.weights: Tensor = torch.ones(0, 0)

    @property
    def rollouts(self) -> Rollouts:
        """What draws; made at the first rollout."""
        if self._rollouts is None:
            raise RuntimeError("there was no rollout yet")
        return self._rollouts

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """One completion of each prompt, as TRL asks for it.

        Raises:
            ValueError: the trainer has a setting under which these rollouts, or their weights, would be wrong; it is named.
        """
        if self._rollouts is None:
            self._rollouts = self._begin(trainer)
        ids = tokenized(prompts, trainer)
        self._rollouts.plan = self._plan if self.gate is None else self.gate.plan
        began = time.monotonic()
        found = self._rollouts(ids, new_tokens=trainer.max_completion_length)
        lengths = found.lengths.tolist()
        self._see(found, trainer, sum(lengths) / (time.monotonic() - began))
        return {
            "prompt_ids": ids,
            "completion_ids": [row[:n] for row, n in zip(found.tokens.tolist(), lengths, strict=True)],
            "logprobs": [row[:n] for row, n in zip(found.sparse.tolist(), lengths, strict=True)],
        }

    def distill(self, trainer: Any, prompts: Tensor, mask: Tensor, advantages: Tensor) -> None:
        """The adapter's step on the latest rollout; prompts and mask int64 `[N, L]`, advantages `[N]`."""
        assert self.adapter is not None
        assert self.last is not None
        terms = self.adapter.learn(self.last, prompts, mask, advantages, self.rollouts.plan, trainer.temperature)
        for name, value in terms.items():
            trainer._log_metric(f"rollout/distill_{name}", value)
            self.history[-1][f"distill_{name}"] = value

    def _begin(self, trainer: Any) -> Rollouts:
        check_trainer(trainer, self.cap, self.adapter is not None)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        around = contextlib.nullcontext if self.adapter is None else self.adapter.decoding
        plan = self._plan if self.gate is None else self.gate.plan
        ends, options = trainer.eos_token_ids, self._options
        return Rollouts(model, plan, temperature=trainer.temperature, ends=ends, decoding=around, **options)

    def _see(self, found: Rollout, trainer: Any, speed: float) -> None:
        corrected = importance_weights(found.dense, found.sparse, found.mask, self.cap, self.level, self.drop)
        self.last, self.weights = found, corrected.weights
        if not trainer.model.training:
            return
        decode = "the plan" if self.gate is None else self.gate.name
        row: dict[str, float | str] = {
            "acceptance": float(found.accepted[found.mask].mean()),
            "effective_size": corrected.effective,
            "over_cap": float(corrected.over.sum() / found.mask.sum()),
            "busy": found.busy,
            "tokens_per_second": speed,
        }
        if isinstance(policy := self.rollouts.plan.decode, PageSparse) and policy.schedule is not None:
            row["pages"] = pages_read(policy.schedule, found.positions[found.mask].unique().tolist())
        if self.gate is not None:
            self.gate.saw(found.accepted, found.positions, found.mask)
            if self.gate.by_bin:
                row["worst_acceptance"] = min(self.gate.by_bin.values())
        for name, value in row.items():
            trainer._log_metric(f"rollout/{name}", value)
        self.history.append({**row, "decode": decode})


class SparseGRPO:
    """A base to put before TRL's `GRPOTrainer`: losses of tokens are multiplied by the weights of their rollout."""

    rollout_func: Any
    model: Any

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        rollouts = self.rollout_func
        if isinstance(rollouts, SparseRollouts):
            assert rollouts.last is not None
            if rollouts.adapter is not None and self.model.training:
                rollouts.distill(self, output["prompt_ids"], output["prompt_mask"], output["advantages"])
            output["advantages"] = weighted(output["advantages"], rollouts.weights, output["completion_ids"].shape[1])
        return output


def weighted(advantages: Tensor, weights: Tensor, length: int) -> Tensor:
    """`[N]`, or `[N, length]`, times `[N, T]`: `[N, length]`; padding behind T has weight 1. Weights are no less than 0, so that
    each term of the clipped loss is multiplied by its token's."""
    padded = torch.nn.functional.pad(weights, (0, length - weights.shape[1]), value=1.0)
    return (advantages if advantages.dim() == 2 else advantages[:, None]) * padded


def tokenized(prompts: Sequence[Any], trainer: Any) -> list[list[int]]:
    """Token ids of texts, or of conversations by the trainer's chat template."""
    if all(isinstance(p, str) for p in prompts):
        return [list(ids) for ids in trainer.processing_class(text=list(prompts))["input_ids"]]
    options = dict(chat_template=trainer.chat_template, **trainer.chat_template_kwargs)
    make = trainer.processing_class.apply_chat_template
    return [make(list(p), add_generation_prompt=True, tokenize=True, return_dict=True, **options)["input_ids"] for p in prompts]


def check_trainer(trainer: Any, cap: float | None, adapter: bool = False) -> None:
    """Raise a ValueError that names what does not go with sparse rollouts."""
    args = trainer.args
    cut = [f"{name}={getattr(args, name)}" for name, whole in WHOLE.items() if getattr(args, name) not in whole]
    asked = {
        f"{', '.join(cut)}: tokens are drawn from the whole distribution": bool(cut),
        "use_vllm": trainer.use_vllm,
        "tools": bool(trainer.tools),
        "weights that are sharded (FSDP, ZeRO-3)": trainer.is_fsdp_enabled or _is_zero3(trainer),
        "loss_type='vespo', which weights sequences itself": cap is not None and trainer.loss_type == "vespo",
        "a trainer without tsa_compile.rl.trl.SparseGRPO before GRPOTrainer: cap and adapter must be None": (
            (cap is not None or adapter) and not isinstance(trainer, SparseGRPO)
        ),
    }
    wrong = [what for what, is_asked in asked.items() if is_asked]
    if wrong:
        raise ValueError(f"sparse rollouts do not go with {'; '.join(wrong)}")


def _is_zero3(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
