"""The user's prompts as keyword arguments of the model, a fingerprint of both, and the texts that are held back from training."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

Tensor = torch.Tensor
T = TypeVar("T")


def as_inputs(model: nn.Module, prompts: Iterable[Any], last: int, longer_than: int) -> list[dict[str, Any]]:
    """One dict of keyword arguments for each prompt, on the model's device.

    Args:
        prompts: token ids (a list, or an int64 tensor `[L]` or `[1, L]`) or a mapping of keyword arguments with
            `input_ids`. One prompt an entry, without padding.
        last: predictions that are compared; `logits_to_keep` and `use_cache=False` are passed where forward takes them.
        longer_than: tokens up to which the policy runs a prompt dense, so that it would measure nothing.

    Raises:
        ValueError: no prompt, a prompt that is too short, more than one row, or what is none of the above.
    """
    device = next(model.parameters()).device
    extra = {"use_cache": False, "logits_to_keep": last}
    taken = inspect.signature(model.forward).parameters
    inputs = []
    for number, prompt in enumerate(prompts):
        given = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
        if "input_ids" not in given:
            raise ValueError(f"prompt {number} has no input_ids; it has {sorted(given)}")
        ids = torch.as_tensor(given["input_ids"])
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.is_floating_point():
            raise ValueError(f"prompt {number} must be one row of token ids, got {ids.dtype} {tuple(ids.shape)}")
        if ids.shape[1] <= longer_than:
            raise ValueError(
                f"prompt {number} has {ids.shape[1]} tokens; the policy runs up to {longer_than} dense "
                "(min_tokens + window), so it says nothing: give longer prompts or a smaller min_tokens"
            )
        given["input_ids"] = ids
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
        inputs.append({**{name: x for name, x in extra.items() if name in taken}, **given})
    if not inputs:
        raise ValueError("calibrate needs at least one prompt")
    return inputs


def fingerprint(model: nn.Module, inputs: list[dict[str, Any]]) -> str:
    """A hash of the prompts' tokens and of the first numbers of each parameter: whether a state file fits."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].double().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + head)
    for given in inputs:
        digest.update(given["input_ids"].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions(model: nn.Module) -> dict[str, str]:
    """What a measurement of the model was made with."""
    from tsa_compile import __version__

    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else parameter.device.type
    return {
        "model": type(model).__name__, "device": device, "dtype": str(parameter.dtype).removeprefix("torch."),
        "torch": torch.__version__, "tsa_compile": __version__,
    }  # fmt: skip


def held_back(texts: Sequence[T], number: int) -> tuple[Sequence[T], Sequence[T]]:
    """(the texts to train on, the last `number`, which are measured).

    Raises:
        ValueError: `number` is negative, or none is left to train on.
    """
    if not 0 <= number < len(texts):
        raise ValueError(f"{len(texts)} texts, of which {number} are held out: none is left to train on")
    own = len(texts) - number
    return texts[:own], texts[own:]
