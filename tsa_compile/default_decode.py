"""Decode steps under a plan that names no policy for them: `Exact` where it was measured to pay, the model's own elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from tsa_compile import pays
from tsa_compile.cache.names import cache_name
from tsa_compile.plan import Plan
from tsa_compile.policies.exact import Exact

HALF = (torch.float16, torch.bfloat16)  # what was measured
OWN = "the model's own"


class DefaultDecode(NamedTuple):
    """A plan, and what its decode steps are by default.

    Args:
        plan: the given one, or the same with `Exact` for decode steps.
        pays_from: rows of the cache from which on a step is `Exact`; None: by default none is.
        said: the same in words, for the report; "" where the plan itself says what decode steps are.
    """

    plan: Plan
    pays_from: int | None
    said: str


def default_decode(plan: Plan, model: nn.Module) -> DefaultDecode:
    """The plan with the decode policy that it has by default, on the device where the model is now.

    Plans with `where="pays"` alone get one, if they name none. A GPU of which nothing was measured gets none: unlike a prompt's,
    the cache of a step and how it is run change with the policy.
    """
    named = plan.decode is not None or any(rule.phase == "decode" for rule in plan.rules)
    if plan.where != "pays" or named:
        return DefaultDecode(plan, None, "")
    why = _why_own(model)
    if why is not None:
        return DefaultDecode(plan, None, f"{OWN}: {why}")
    device, sizes = model_device(model), _sizes(model)
    assert device is not None
    assert sizes is not None
    least = pays.measured_from(Exact().name, device, *sizes)
    if least is None:
        return DefaultDecode(plan, None, f"{OWN}: Exact was not faster at the longest cache measured on this GPU")
    said = f"Exact from {least} cached tokens on, as measured on a GPU like this one"
    return DefaultDecode(dataclasses.replace(plan, decode=Exact()), least, said)


def model_device(model: nn.Module) -> torch.device | None:
    """Where the first of the model's parameters lies; None: it has none."""
    return next((p.device for p in model.parameters()), None)


def _why_own(model: nn.Module) -> str | None:
    """Why no decode step of the model is `Exact` by default; None: from some length on they may be."""
    device, config = model_device(model), getattr(model, "config", None)
    if device is None or device.type != "cuda":
        return f"the model is on {'no device' if device is None else device.type}, not on cuda"
    if cache_name(model) is None or not getattr(model, "_can_compile_fullgraph", False) or config is None:
        return f"{type(model).__name__} is no model of transformers that says it works with static caches"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if getattr(model, "dtype", None) not in HALF:
        return f"{getattr(model, 'dtype', None)}: it was measured in half precision"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        return f"attention implementation {implementation!r}"
    if _sizes(model) is None:
        return "the config does not say its heads"
    if not pays.is_measured(Exact().name, device):
        return "not measured on a GPU like this one; `tsa-compile tune` does"
    return None


def _sizes(model: Any) -> tuple[int, int, int] | None:
    """(head dim, query heads, KV heads), as the model's config has them; None: it does not say."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(config, "hidden_size", None), int):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return dim, heads, kv_heads
