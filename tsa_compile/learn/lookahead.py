"""Trains the index of `Resident(index="learned")` on the user's prompts, the model as it is (FlashMemory, arXiv 2606.09079).

At a few layers a retriever scores all pages by one query; a page is to score high if enough layers need it at one of the next
`interval` tokens, by the dense model's own attention. Published: 10,000 texts of 16K to 512K tokens. One text is in the model at
a time; its queries and keys are seen layer by layer as it is read, and only those of the rows that choose are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.cache.lookahead_index import LookaheadIndex
from tsa_compile.cache.resident_rule import asked_layers
from tsa_compile.index_weights import save_indexes
from tsa_compile.learn.attention_watch import watched
from tsa_compile.learn.indexer_settings import schedule
from tsa_compile.learn.indexer_state import TrainingState
from tsa_compile.learn.lookahead_labels import Windows, draw_rows
from tsa_compile.learn.lookahead_layer import LookaheadLayer
from tsa_compile.learn.lookahead_settings import LookaheadTraining
from tsa_compile.learn.model_inputs import fingerprint
from tsa_compile.learn.rotations import rotations_of
from tsa_compile.learn.text_decoder import texts_of
from tsa_compile.plan import Plan
from tsa_compile.policies.resident import Resident

Tensor = torch.Tensor


def train_lookahead(
    model: nn.Module,
    prompts: Iterable[Any],
    plan: Plan,
    out: str | Path,
    training: LookaheadTraining | None = None,
    *,
    state: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """`plan`, whose decode steps go by a trained index, saved at `out`, its weights beside it (`out` with ".safetensors").

    Args:
        model: a decoder of transformers in evaluation mode, which rotates queries and keys (RoPE); it is left as it was.
        prompts: token ids, one unpadded text an entry, as long as in use.
        plan: its `decode` is a `Resident`, whose interval, layers, sinks and recent pages the index is trained for.
        out: a JSON file.
        training: how; None: as `LookaheadTraining()` says.
        state: a file; an interrupted call goes on from it, with the same result.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is wrong, a text is too short, or the model has no rotation that is known.
    """
    training = LookaheadTraining() if training is None else training
    policy = plan.decode
    if not isinstance(policy, Resident):
        raise ValueError(f"plan: its decode must be a Resident, got {policy!r}")
    texts = texts_of(model, prompts, policy.interval)
    layers = _layers(model, policy, training)
    key: dict[str, Any] = {"prompts and model": fingerprint(model, [{"input_ids": x} for x in texts]), "layers": sorted(layers)}
    key |= {"interval": policy.interval, "sinks": policy.sinks, "recent": policy.recent}
    held = TrainingState(state, {**key, **dataclasses.asdict(training)}, layers)
    updates = max(1, training.epochs * len(texts))
    update = functools.partial(_update, model, layers=layers, policy=policy, training=training, of=updates)
    work = [functools.partial(update, texts[n % len(texts)], number=n) for n in range(updates)]
    held.run(work, "index: loss", progress)
    weights, indexes = Path(out).with_suffix(".safetensors"), {path: _trained(layer) for path, layer in layers.items()}
    save_indexes(weights, indexes.items())
    numbers = tuple(sorted(layer.number for layer in layers.values()))
    told = {
        "made by": "tsa_compile.learn.lookahead",
        "training": {**dataclasses.asdict(training), "texts": len(texts)},
        "loss of each text": [round(x, 5) for x in held.losses],
    }
    decode = dataclasses.replace(policy, index="learned", layers=numbers)
    made = dataclasses.replace(plan, decode=decode, weights=str(weights), notes={**plan.notes, "lookahead": told})
    made.save(out)
    return made


def _trained(layer: LookaheadLayer) -> LookaheadIndex:
    assert layer.index is not None
    return layer.index


def _layers(model: nn.Module, policy: Resident, training: LookaheadTraining) -> dict[str, LookaheadLayer]:
    modules: dict[str, Any] = dict(model.named_modules())
    rotations = rotations_of(model)
    paths = {int(modules[path].layer_idx): path for path in rotations}
    numbers = asked_layers(policy.layers, max(paths) + 1)
    return {paths[n]: LookaheadLayer(rotations[paths[n]], training, n) for n in numbers}


def _update(
    model: Any, ids: Tensor, layers: Mapping[str, LookaheadLayer], policy: Resident, training: LookaheadTraining, number: int,
    of: int,
) -> list[float]:  # fmt: skip
    """`reuse` updates of each layer on one text; the mean loss. With no epochs the layers are only shown it."""
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + number)
    windows = read(model, ids, layers, policy, training.top_p, training.rows, generator)
    needed = windows.needed(training.agree or -(-windows.layers // 7))
    losses = []
    for i in range(training.reuse if training.epochs else 0):
        rate = training.lr * schedule((number * training.reuse + i + 1) / (of * training.reuse))
        losses += [layer.update(needed, windows.candidates, rate, generator) for layer in layers.values()]
    return [sum(losses) / len(losses)] if losses else []


@torch.no_grad()
def read(
    model: Any, ids: Tensor, layers: Mapping[str, LookaheadLayer], policy: Resident, top_p: float, number: int,
    generator: torch.Generator,
) -> Windows:  # fmt: skip
    """What follows some queries of a text `[1, L]`, drawn at random; `layers` are shown theirs."""
    length = ids.shape[1]
    rows = draw_rows(length, number, policy.interval, policy.sinks, policy.recent, generator).to(ids.device)
    windows = Windows(length, rows, policy.interval, policy.sinks, policy.recent, top_p)

    def look(path: str, q: Tensor, k: Tensor, scale: float) -> None:
        windows.add(q[0], k[0], scale)
        if path in layers:
            layers[path].show(q[0], k[0], rows)

    with watched(model, look):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return windows
