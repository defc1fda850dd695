"""The running batch of a rollout: rows of one cache that decode together, each with a sample of its own, refilled as they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tsa_compile.cache import Cache
from tsa_compile.cache.names import cache_name
from tsa_compile.cache.storage import Pool
from tsa_compile.generate.cached_steps import CachedSteps
from tsa_compile.generate.rollout_slots import Drawn, Slots, draw
from tsa_compile.generate.scoring import left_padded, positions_of
from tsa_compile.plan_states import states_for
from tsa_compile.session import Session
from tsa_compile.steps import FIXED, REPLAYED

Tensor = torch.Tensor


class Drawing(NamedTuple):
    """How tokens are drawn; see `Rollouts`."""

    temperature: float
    ends: tuple[int, ...]
    top: int
    look_every: int
    rows_at_once: int
    generator: torch.Generator | None


class RolloutBatch:
    """Decodes all samples, under the plan that is in force.

    Prompts are padded at the left to the longest of them, so that every row of the cache begins its new tokens at the same
    place, and a sample that has ended gives its row to another prompt by a copy of keys and values.

    Args:
        model: of the session.
        session: whose plan in force is `plan`.
        prompts: int64 `[L]`, one for each sample; samples of one prompt have the same tensor.
        batch: rows.
        new_tokens: of each sample, at most.
        how: how tokens are drawn.
    """

    def __init__(
        self, model: Any, session: Session, prompts: Sequence[Tensor], batch: int, new_tokens: int, how: Drawing
    ) -> None:
        self.model, self.session, self.prompts, self.how = model, session, prompts, how
        name = cache_name(model)
        assert name is not None
        self._name, self._device = name, prompts[0].device
        self._begin = max(map(len, prompts))
        self._new_tokens, self._room = new_tokens, new_tokens + how.look_every  # a row may run on until the next look
        self.batch = min(batch, len(prompts))
        top = min(how.top, int(model.config.get_text_config().vocab_size))
        self.slots = Slots(self.batch, len(prompts), new_tokens, how.ends, top, self._device)
        self._waiting = deque(range(len(prompts)))
        self._at: list[int | None] = [None] * self.batch  # steps since a row's sample began; None: it has none
        self._cache: Any = None
        self._prefills = Pool()
        self._steps: CachedSteps | None = None
        self.steps = 0

    def run(self) -> None:
        """Until every sample has ended; they are in `slots` then."""
        counts = self.session.steps.counts()
        if not self.session.backend.graphs:
            self._trace_prefills()
        self._refill(list(range(self.batch)))
        while left := [self._new_tokens - 1 - at for at in self._at if at is not None]:
            for _ in range(min(self.how.look_every, max(left))):
                self._step()
            ended = self.slots.ended.tolist()  # the one wait
            free = [b for b, at in enumerate(self._at) if at is not None and ended[b]]
            if free:
                self._refill(free)
        for layer in self._cache.layers:
            layer.release()
        new = {how: n - counts.get(how, 0) for how, n in self.session.steps.counts().items()}
        others = sorted(how for how, n in new.items() if n and how not in (FIXED, REPLAYED))
        if others:
            raise ValueError(f"decode steps of this model do not run on fixed buffers: {'; '.join(others)}")

    def _step(self) -> None:
        assert self._steps is not None
        logits = self._steps.step(self.slots.last)[:, -1]
        self.slots.take(self._draw(logits))
        self.steps += 1
        self._at = [None if at is None else at + 1 for at in self._at]

    def _draw(self, logits: Tensor) -> Drawn:
        return draw(logits, self.how.temperature, self.how.top, self.how.generator)

    def _refill(self, rows: list[int]) -> None:
        """Give these rows the next samples; those for which there is none keep one token, and go on drawing for nobody."""
        samples = [self._waiting.popleft() if self._waiting else None for _ in rows]
        given = [(b, n) for b, n in zip(rows, samples, strict=True) if n is not None]
        for b, n in zip(rows, samples, strict=True):
            self._at[b] = None if n is None else 0
        unique = list({id(self.prompts[n]): self.prompts[n] for _, n in given}.values())
        for begin in range(0, len(unique), self.how.rows_at_once):
            part = unique[begin : begin + self.how.rows_at_once]
            place = {id(prompt): i for i, prompt in enumerate(part)}
            self._prefill(part, [(b, n, place[id(self.prompts[n])]) for b, n in given if id(self.prompts[n]) in place])
        steps = self._steps
        assert steps is not None
        idle = [b for b, at in enumerate(self._at) if at is None]
        if idle:
            whole = torch.ones(len(idle), self._begin, dtype=torch.int64, device=self._device)
            steps.restart(self._index(idle), whole, positions_of(whole))
        steps.keep([1 - self._begin if at is None else at for at in self._at])

    def _trace_prefills(self) -> None:
        """One prompt is a graph and several are another: both now, so that no later refill is the first of its kind."""
        for count in range(1, min(2, self.how.rows_at_once) + 1):
            for layer in self._read([self.prompts[0]] * count)[0].layers:
                layer.release()

    def _read(self, prompts: Sequence[Tensor]) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Prompts, left padded: (a cache of theirs, their next token's logits `[B, V]`, mask, positions `[B, L]`)."""
        ids, mask = left_padded(prompts, self._device, self._begin)
        positions = positions_of(mask)
        small = Cache(self.model, len(prompts), self._begin, self._prefills)  # never the storage that steps are recorded over
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True, self._name: small}
        return small, self.session(**call, logits_to_keep=1).logits[:, -1].float(), mask, positions

    def _prefill(self, prompts: list[Tensor], given: list[tuple[int, int, int]]) -> None:
        """Read prompts; `given`: batch row, sample and prompt of each of the rows that begin now."""
        small, logits, mask, positions = self._read(prompts)
        rows, samples, chosen = (self._index(x) for x in zip(*given, strict=True))
        if self._steps is None:
            self._steps = self._begin_steps(small, mask, positions)
        for own, read in zip(self._cache.layers, small.layers, strict=True):
            for to, rows_of in zip(own.settled()[:2], (read.keys, read.values), strict=True):
                to[rows, :, : self._begin] = rows_of[chosen]
            read.release()
        self._steps.restart(rows, mask[chosen], positions[chosen])
        self.slots.start(rows, samples, self._draw(logits[chosen]))

    def _begin_steps(self, small: Any, mask: Tensor, positions: Tensor) -> CachedSteps:
        """A cache of the whole batch, whose rows are still to be written, and steps over it."""
        self._cache = Cache(self.model, self.batch, self._begin + self._room, self.session.steps.pool)
        kinds = states_for(self.session.plan, self.model)
        for n, (own, read) in enumerate(zip(self._cache.layers, small.layers, strict=True)):
            own.keep(kinds(n))
            own.update(*(x[:1].expand(self.batch, -1, -1, -1) for x in (read.keys, read.values)))
        first = {"attention_mask": mask[:1].repeat(self.batch, 1), "position_ids": positions[:1].repeat(self.batch, 1)}
        steps = CachedSteps(self.model, self.session, self._cache, first, self._room)
        why = steps.why_together()
        if why is not None:
            raise ValueError(f"rows of a rollout end and begin apart, which this model's cache cannot: {why}")
        steps.part(self.batch)
        return steps

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)
