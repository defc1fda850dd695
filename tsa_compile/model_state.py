"""What a recorded step rests on beside its inputs: where the model's tensors lie, its modes, and that nobody hooks into it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

_FLAGS = ("output_attentions", "output_hidden_states", "use_cache", "return_dict", "_attn_implementation")  # of a config
_TRAINING = operator.itemgetter("training")


class ModelState:
    """Reads the state of one model, fast enough for every step.

    Args:
        model: its modules are listed at `look`; those added later are seen at the next one.
        own: the type of our own hooks on it, which change nothing.
    """

    def __init__(self, model: nn.Module, own: type) -> None:
        self._config = getattr(model, "config", None)
        self._own = own
        self._root = model._forward_pre_hooks
        self.look(model)

    def look(self, model: nn.Module) -> None:
        """List the modules and their tensors again. Called for each new request, as it takes longer than a step may."""
        modules = list(model.modules())
        self._modules = [m.__dict__ for m in modules]
        self._hooks = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks) if d is not self._root]
        places = [(d, name) for m in modules for d in (m._parameters, m._buffers) for name in d]
        self._places = [(d, name) for d, name in places if d[name] is not None]

    def read(self) -> tuple[Any, ...]:
        """Equal for two steps if one may stand for the other."""
        device = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        modes = (device, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        flags = tuple(getattr(self._config, name, None) for name in _FLAGS)
        addresses = [0 if (x := d.get(n)) is None else x.data_ptr() for d, n in self._places]
        return modes, flags, any(map(_TRAINING, self._modules)), addresses

    def is_hooked(self) -> bool:
        """Does anyone but us have a forward hook on a module, or on all modules of the process?"""
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks or any(self._hooks):
            return True
        return any(type(hook) is not self._own for hook in self._root.values())
