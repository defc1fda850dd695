"""Train a `BlockLM` on recall, and measure what remembered keys cost it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import torch

from tsa_compile.generate.diffusion import diffuse
from tsa_compile.kernels.types import Keys
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Policy
from tsa_compile.tools.diffusion.model import BlockLM, Sizes, training_loss, training_mask
from tsa_compile.tools.diffusion.recall_task import RecallTask

Tensor = torch.Tensor
LOOK_EVERY = 10  # steps between two looks at the loss: each waits for the device


def train(
    task: RecallTask, sizes: Sizes, steps: int, batch: int, rate: float, seed: int = 0, device: str = "cpu",
    text: Tensor | None = None, seconds: float | None = None, told: Callable[[int, int, float], None] | None = None,
) -> BlockLM:  # fmt: skip
    """A model that has learned the task; the same for the same arguments on the same machine, unless `seconds` end it.

    Prefixes are short at first (`Curriculum`), in as many more rows: among many tokens a fact is not found by chance, and nothing
    is learned.

    Args:
        steps, batch, rate: of AdamW, `batch` rows of the longest prefix; the rate rises and falls once (one cycle).
        text: see `RecallTask.sample`. Its blocks are learned too, if it is given.
        seconds: when to stop at the latest; None: after `steps`.
        told: called every 50 steps with the step, the prefix and the loss of the answers.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = BlockLM(sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    curriculum, masks, start = Curriculum(task), dict[int, Tensor](), time.monotonic()
    for step in range(steps):
        now = dataclasses.replace(task, prefix=curriculum.prefix)
        first = now.prefix if text is None else 0
        if now.prefix not in masks:
            masks = {now.prefix: training_mask(now.prefix + now.block, now.block, first).to(device)}
        rows = batch * (task.prefix + task.block) // (now.prefix + task.block)
        ids, noise = _batch(now, rows, generator, text)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = training_loss(model, ids.to(device), noise.to(device), masks[now.prefix], first)
        optimizer.zero_grad()
        (loss.answers + loss.prose).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % LOOK_EVERY == LOOK_EVERY - 1:
            curriculum.saw(loss.answers.item())
        if told is not None and step % 50 == 49:
            told(step + 1, now.prefix, loss.answers.item())
        if seconds is not None and time.monotonic() - start > seconds:
            break
    return model.eval()


class Curriculum:
    """Prefixes that double, from twice as many tokens as there are keys to the task's, each time the last one is mastered: when
    the mean loss of the answers is under a fifth of what guessing among the values has."""

    def __init__(self, task: RecallTask) -> None:
        self.longest, self.mastered = task.prefix, 0.2 * math.log(task.values)
        self.prefix = min(task.prefix, -(-2 * task.keys // task.block) * task.block)
        self.mean = math.inf

    def saw(self, loss: float) -> None:
        """The loss of one more batch."""
        self.mean = loss if math.isinf(self.mean) else 0.8 * self.mean + 0.2 * loss
        if self.mean < self.mastered and self.prefix < self.longest:
            self.prefix, self.mean = min(2 * self.prefix, self.longest), math.inf


def _batch(task: RecallTask, batch: int, generator: torch.Generator, text: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, noise); with text the noise covers its blocks too, at a rate of its own for each row, but for facts, which nothing
    foretells."""
    ids, noise = task.sample(batch, generator, text), task.noise(batch, generator)
    if text is not None:
        rate = torch.rand(batch, 1, generator=generator)
        prose = ids[:, : task.prefix] >= task.first_filler
        noise = torch.cat([prose & (torch.rand(batch, task.prefix, generator=generator) < rate), noise], 1)
    return ids, noise


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a plan did on the task.

    Args:
        right: share of the answers that are right.
        later: the same, of those that further steps took.
        forwards: denoising calls of the model for a block, the first included.
        mass: share of the exact attention to the prefix, in further steps, that the lists held; None: there were none.
        overlap: share of a list that the further step itself would choose.
        never_bit: share of the blocks in which no list left a token out.
    """

    right: float
    later: float
    forwards: float
    mass: float | None
    overlap: float | None
    never_bit: float


class Recall:
    """A `watch` of `diffuse`: how much of what a step attends to is in the list that it reads.

    Independent of how the list was chosen: exact attention of the step itself is the judge, and the same number of keys.
    """

    def __init__(self) -> None:
        self.mass: list[float] = []
        self.overlap: list[float] = []

    def __call__(self, site: AttentionSite, keys: Keys) -> None:
        x, prefix, rows = site.operands, site.k_len - site.q_len, site.q_len
        count = keys.indices.shape[2] - rows
        if count == prefix:
            return
        k = x.k.repeat_interleave(site.heads // site.kv_heads, 1)
        weights = (site.scale * x.q.float() @ k.float().mT).softmax(-1)[..., :prefix].mean(2)  # [B, H, prefix]
        weights = weights.unflatten(1, (site.kv_heads, -1)).sum(2)
        listed = torch.zeros_like(weights).scatter(2, keys.indices[..., :count].long(), 1.0)
        best = torch.zeros_like(weights).scatter(2, weights.topk(count).indices, 1.0)
        self.mass.append(float(((weights * listed).sum(2) / weights.sum(2).clamp(min=1e-30)).mean()))
        self.overlap.append(float((listed * best).sum(2).mean()) / count)


def evaluate(
    model: BlockLM, task: RecallTask, plans: Mapping[str, Policy | None], rows: int = 200, seed: int = 1,
    text: Tensor | None = None, threshold: float | None = None,
) -> dict[str, Outcome]:  # fmt: skip
    """Each plan on the same new prompts.

    Args:
        threshold: of `diffuse`; None: one answer a step.
    """
    ids = task.sample(rows, torch.Generator().manual_seed(seed), text).to(next(model.parameters()).device)
    prompt, wanted = ids[:, : -task.questions], ids[:, -task.questions :]
    found = {}
    for name, plan in plans.items():
        watch = Recall()
        done = diffuse(
            model, prompt, task.questions, mask_id=model.sizes.mask_id, block=task.block, plan=plan, watch=watch,
            threshold=threshold,
        )  # fmt: skip
        right = done.ids[:, -task.questions :] == wanted
        later = right[done.blocks[-1].steps[:, -task.questions :] > 1]
        found[name] = Outcome(
            right=right.float().mean().item(),
            later=later.float().mean().item() if later.numel() else 1.0,
            forwards=sum(b.forwards for b in done.blocks) / len(done.blocks),
            mass=_mean(watch.mass),
            overlap=_mean(watch.overlap),
            never_bit=done.never_bit,
        )
    return found


def _mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
