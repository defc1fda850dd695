"""Weights of learned indexes: a safetensors file beside the plan, and submodules of the attentions that they are for.

A tensor is called as in the model's `state_dict()`, such as "model.layers.3.self_attn.tsa_index.query"; the file's metadata say
for each attention which query heads these are and how queries and keys are rotated.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tsa_compile.cache.head_index import HeadIndex, indexes
from tsa_compile.cache.learned_index import NAME, LearnedIndex
from tsa_compile.cache.lookahead_index import LookaheadIndex, lookaheads
from tsa_compile.kernels.types import Rotation
from tsa_compile.policies.head_split import HeadSplit
from tsa_compile.policies.resident import Resident

if TYPE_CHECKING:
    from tsa_compile.plan import Plan

FORMAT = {"format": "tsa_compile.index", "version": "1"}
_KINDS: dict[str, type[LearnedIndex]] = {kind.kind: kind for kind in (HeadIndex, LookaheadIndex)}


def save_indexes(path: str | Path, found: Iterable[tuple[str, LearnedIndex]]) -> None:
    """Write the indexes of the attentions at these paths; needs safetensors, which transformers brings."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    for module, index in found:
        told[module] = {"kind": index.kind, **index.told(), "interleaved": index.interleaved, "factor": index.factor}
        for name in (*index.tensors, "frequencies"):
            tensors[f"{module}.{NAME}.{name}"] = getattr(index, name).detach().cpu().contiguous()
    fresh = Path(path).with_name(Path(path).name + ".new")
    save_file(tensors, fresh, {**FORMAT, "indexes": json.dumps(told)})
    os.replace(fresh, path)  # an interruption leaves no half of it


def load_indexes(path: str | Path) -> dict[str, Any]:
    """The indexes of a file, on the CPU, by the path of the attention: each a `LearnedIndex` of its kind.

    Raises:
        ValueError: it is no such file, or of another version; the message names it.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            told = dict(file.metadata() or {})
            if {name: told.get(name) for name in FORMAT} != FORMAT:
                raise ValueError(f"{path}: no weights of an index, or of another version than {FORMAT['version']}")
            return {module: _built(module, given, file) for module, given in json.loads(told["indexes"]).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _built(module: str, given: Mapping[str, Any], file: Any) -> LearnedIndex:
    kind = _KINDS[given.get("kind", HeadIndex.kind)]  # files of before there were others do not say it
    weights = {name: file.get_tensor(f"{module}.{NAME}.{name}") for name in kind.tensors}
    frequencies = file.get_tensor(f"{module}.{NAME}.frequencies")
    rotation = Rotation(tuple(frequencies.tolist()), bool(given["interleaved"]), float(given["factor"]))
    return kind.rebuilt(given, weights, rotation)


def attach_indexes(model: nn.Module, found: Mapping[str, LearnedIndex]) -> Callable[[], None]:
    """Each index becomes the submodule `tsa_index` of its attention, in its dtype and on its device; returns what undoes that.

    Raises:
        ValueError: the model has no such attention.
    """
    modules = dict(model.named_modules())
    missing = sorted(set(found) - set(modules))
    if missing:
        raise ValueError(f"weights of an index for {missing[0]}, which the model does not have")
    for path, index in found.items():
        like = next(modules[path].parameters())
        modules[path].add_module(NAME, index.to(like.device, like.dtype))
    held = [(weakref.ref(modules[path]), weakref.ref(index)) for path, index in found.items()]

    def remove() -> None:
        for of_module, of_index in held:
            module, index = of_module(), of_index()
            if module is not None and index is not None and getattr(module, NAME, None) is index:  # not one that came later
                delattr(module, NAME)

    return remove


def check_indexes(model: nn.Module, plan: Plan) -> None:
    """Raise a ValueError unless each index is of the heads that the plan has for its attention, and each rule has its indexes."""
    known = dict(indexes(model))
    for path, index in known.items():
        for phase in ("decode", "draft"):
            policy = plan.policy_at(path, phase)
            if isinstance(policy, HeadSplit) and policy.mass is not None and policy.retrieval != index.heads:
                raise ValueError(f"{path}: an index of heads {index.heads}, and the plan says {policy.retrieval}")
    for n, rule in enumerate(plan.rules):
        if rule.phase in ("decode", "draft") and _needs_index(rule.policy) and not any(rule.matches(path) for path in known):
            raise ValueError(f"plan rule {n}: HeadSplit.mass needs weights for {rule.modules!r}; Plan.weights names none")
    for phase in ("decode", "draft"):
        if _needs_index(getattr(plan, phase)) and not known:
            raise ValueError(f"Plan.{phase}: HeadSplit.mass needs weights; Plan.weights names none")
    for named in {plan.decode, *(rule.policy for rule in plan.rules)}:
        if isinstance(named, Resident):
            named.check_index(lookaheads(model))


def _needs_index(policy: object) -> bool:
    return isinstance(policy, HeadSplit) and policy.mass is not None and bool(policy.retrieval)
