"""Trains the index of `HeadSplit(mass=...)` on the user's prompts: RTPurbo's first stage (arXiv 2605.16928), the model as it is.

Each head that looks things up has two projections, of its queries and of its KV head's keys before rotation, whose softmax is to
be near the head's attention: KL(teacher || student), the teacher cut to the fewest keys that hold 0.9 of it. One text is in the
model at a time; its queries and keys are seen layer by layer as it is read, and are not kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.head_weights import save_indexes
from tsa_compile.learn.attention_watch import watched
from tsa_compile.learn.indexer_layer import IndexedLayer
from tsa_compile.learn.indexer_start import INITS
from tsa_compile.learn.indexer_state import TrainingState
from tsa_compile.learn.model_inputs import fingerprint
from tsa_compile.learn.rotations import rotations_of
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.plan import Plan
from tsa_compile.policies.head_split import HeadSplit
from tsa_compile.progress import progress as progress_bar

Tensor = torch.Tensor
WARM_UP = 0.1  # of the updates


@dataclasses.dataclass(frozen=True)
class Training:
    """How an index is trained.

    Args:
        width: numbers of a projection; None: an eighth of the head dim (published: 16 of 128).
        mass: of a head's attention that the teacher is cut to, and that steps read by the index, in (0, 1).
        init: "balanced" or "svd", see `indexer_start.py`.
        start_texts: texts whose queries and keys the first weights are made of.
        epochs: times that each text is read; 0: the first weights stay.
        rows: query rows of a text that an update is made on, drawn at random behind its first quarter.
        reuse: updates for each reading of a text, each on other rows.
        lr: of AdamW, after a warm-up of a tenth of the updates, falling to 0 as a cosine; weight decay 0.01.
        seed: of the rows.

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    width: int | None = None
    mass: float = 0.9
    init: str = "balanced"
    start_texts: int = 4
    epochs: int = 1
    rows: int = 256
    reuse: int = 4
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("start_texts", 1), ("epochs", 0), ("rows", 1), ("reuse", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < low:
                raise ValueError(f"Training.{name} must be an int >= {low}, got {getattr(self, name)!r}")
        if self.width is not None and (type(self.width) is not int or self.width < 1):
            raise ValueError(f"Training.width must be an int >= 1, or None, got {self.width!r}")
        if not 0 < self.mass < 1 or self.init not in INITS or not self.lr > 0:
            raise ValueError(
                f"Training.mass must be in (0, 1), init one of {INITS} and lr above 0, got {self.mass}, {self.init!r}, {self.lr}"
            )


def train_indexer(
    model: nn.Module,
    prompts: Iterable[Any],
    roles: Plan,
    out: str | Path,
    training: Training = Training(),
    *,
    state: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """The plan whose decode steps go by a trained index, saved at `out`, its weights beside it (`out` with ".safetensors").

    Args:
        model: a decoder of transformers in evaluation mode, which rotates queries and keys (RoPE); it is left as it was.
        prompts: token ids, one unpadded text an entry, as long as in use; published: some 8,000 of 32K to 80K tokens.
        roles: of `learn.head_roles`: a rule of `HeadSplit` for each attention. Heads that look things up get an index.
        out: a JSON file.
        training: how.
        state: a file; an interrupted call goes on from it, with the same result.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is wrong, no head looks things up, or the model has no rotation that is known.
    """
    policies = {rule.modules: rule.policy for rule in roles.rules if rule.phase == "decode"}
    chosen = {str(path): p.retrieval for path, p in policies.items() if isinstance(p, HeadSplit) and p.retrieval}
    if not chosen:
        raise ValueError("roles: no head looks things up in any rule for decode of this plan; learn.head_roles makes one")
    texts = texts_of(model, prompts, 16)
    layers = _layers(model, chosen, training)
    key = {"prompts and model": fingerprint(model, [{"input_ids": x} for x in texts]), "roles": chosen}
    held = TrainingState(state, {**key, **dataclasses.asdict(training)}, layers)
    losses = _train(model, texts, layers, training, held, progress)
    weights = Path(out).with_suffix(".safetensors")
    indexes = [(path, layer.index()) for path, layer in layers.items()]
    save_indexes(weights, indexes)
    plan = _plan(roles, training, weights, indexes, losses, len(texts))
    plan.save(out)
    return plan


def _layers(model: nn.Module, chosen: Mapping[str, tuple[int, ...]], training: Training) -> dict[str, IndexedLayer]:
    rotations = rotations_of(model)
    missing = sorted(set(chosen) - set(rotations))
    if missing:
        raise ValueError(f"roles name {missing[0]}, and the model has attentions at {', '.join(sorted(rotations)[:3])}, ...")
    return {path: IndexedLayer(heads, rotations[path], training.width, training.lr) for path, heads in chosen.items()}


def _train(
    model: nn.Module,
    texts: list[Tensor],
    layers: Mapping[str, IndexedLayer],
    training: Training,
    held: TrainingState,
    progress: bool,
) -> list[float]:
    """The mean loss of each reading of a text; all work that `held` has done already is skipped."""
    first = [functools.partial(_measure, model, ids, layers) for ids in texts[: training.start_texts]]
    updates = training.epochs * len(texts)
    steps = [functools.partial(_update, model, texts[n % len(texts)], layers, training, n, updates) for n in range(updates)]
    with progress_bar(show=progress) as start:
        advance = start("index: first weights", len(first) + len(steps))
        for number, work in enumerate([*first, *steps]):
            if number == len(first):
                for layer in layers.values():
                    layer.begin(training.init)
            if number >= held.done:
                loss = work()
                held.did(number + 1, [] if number < len(first) else [loss])
            said = f"index: KL {held.losses[-1]:.3f}" if held.losses else None
            advance(said)
        if not steps:
            for layer in layers.values():
                layer.begin(training.init)
    return held.losses


@torch.no_grad()
def _measure(model: Any, ids: Tensor, layers: Mapping[str, IndexedLayer]) -> float:
    """Second moments of queries and keys, of one text."""

    def look(path: str, q: Tensor, k: Tensor, scale: float) -> None:
        if path in layers:
            layers[path].measure(q[0], k[0], scale)

    with watched(model, look):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return 0.0


def _update(model: Any, ids: Tensor, layers: Mapping[str, IndexedLayer], training: Training, number: int, of: int) -> float:
    """`reuse` updates of each layer on one text; the mean loss."""
    losses: list[Tensor] = []
    length, generator = ids.shape[1], torch.Generator().manual_seed(training.seed * 1_000_003 + number)
    rows = [
        torch.randperm(length - length // 4, generator=generator)[: training.rows] + length // 4 for _ in range(training.reuse)
    ]
    rates = [training.lr * schedule((number * training.reuse + i + 1) / (of * training.reuse)) for i in range(training.reuse)]

    def look(path: str, q: Tensor, k: Tensor, scale: float) -> None:
        if path in layers:
            losses.extend(layers[path].update(q[0], k[0], scale, rows, rates, training.mass))

    with torch.no_grad(), watched(model, look):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return float(torch.stack(losses).mean())


def schedule(done: float) -> float:
    """Share of the learning rate: a rise, then a cosine down to 0."""
    return done / WARM_UP if done < WARM_UP else 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _plan(
    roles: Plan, training: Training, weights: Path, indexes: list[tuple[str, HeadIndex]], losses: list[float], texts: int
) -> Plan:
    """`roles`, whose heads that look things up go by the index."""
    rules = tuple(
        rule._replace(policy=dataclasses.replace(rule.policy, keep=1.0, mass=training.mass))
        if rule.phase == "decode" and isinstance(rule.policy, HeadSplit) and rule.policy.retrieval
        else rule
        for rule in roles.rules
    )
    told = {
        "made by": "tsa_compile.learn.indexer",
        "training": {**dataclasses.asdict(training), "width": indexes[0][1].query.shape[1], "texts": texts},
        "KL of each text": [round(x, 4) for x in losses],
    }
    return dataclasses.replace(roles, rules=rules, weights=str(weights), notes={**roles.notes, "index": told})
