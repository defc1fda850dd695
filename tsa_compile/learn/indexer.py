"""Trains the index of `HeadSplit(mass=...)` on the user's prompts: RTPurbo's first stage (arXiv 2605.16928), the model as it is.

Each head that looks things up has two projections, of its queries and of its KV head's keys before rotation, whose softmax is to
be near the head's attention: KL(teacher || student), the teacher cut to the fewest keys that hold 0.9 of it. One text is in the
model at a time; its queries and keys are seen layer by layer as it is read, and are not kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.cache.head_index import HeadIndex
from tsa_compile.index_weights import save_indexes
from tsa_compile.learn.attention_watch import watched
from tsa_compile.learn.indexer_layer import IndexedLayer
from tsa_compile.learn.indexer_settings import Training, schedule
from tsa_compile.learn.indexer_state import TrainingState
from tsa_compile.learn.model_inputs import fingerprint
from tsa_compile.learn.rotations import rotations_of
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.plan import Plan
from tsa_compile.policies.head_split import HeadSplit

Tensor = torch.Tensor


def train_indexer(
    model: nn.Module,
    prompts: Iterable[Any],
    roles: Plan,
    out: str | Path,
    training: Training | None = None,
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
        training: how; None: as `Training()` says.
        state: a file; an interrupted call goes on from it, with the same result.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is wrong, no head looks things up, or the model has no rotation that is known.
    """
    training = Training() if training is None else training
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
    held.run([*first, *steps], "index: KL", progress)
    _begin(layers, training)
    return held.losses


def _begin(layers: Mapping[str, IndexedLayer], training: Training) -> None:
    """The first weights, by what was measured, where there are none yet."""
    for layer in layers.values():
        layer.begin(training.init)


@torch.no_grad()
def _measure(model: Any, ids: Tensor, layers: Mapping[str, IndexedLayer]) -> list[float]:
    """Second moments of queries and keys, of one text; no loss."""

    def look(path: str, q: Tensor, k: Tensor, scale: float) -> None:
        if path in layers:
            layers[path].measure(q[0], k[0], scale)

    with watched(model, look):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return []


def _update(model: Any, ids: Tensor, layers: Mapping[str, IndexedLayer], training: Training, number: int, of: int) -> list[float]:
    """`reuse` updates of each layer on one text; the mean loss."""
    _begin(layers, training)
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
    return [float(torch.stack(losses).mean())]


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
