"""What a recorded step rests on beside its inputs: where the model's tensors lie, its modes, and that nobody hooks into it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

_FLAGS = ("output_attentions", "output_hidden_states", "use_cache", "return_dict", "_attn_implementation")  # of a config
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class ModelState:
    """Reads the state of one model, fast enough for every step.

    Args:
        model: its modules are listed at `look`; those added later are seen at the next one.
        own: the type of our own hooks, which change nothing.
    """

    def __init__(self, model: nn.Module, own: type) -> None:
        self._model = weakref.ref(model)
        self._own = own
        self.look()

    def look(self) -> None:
        """List the modules and their tensors again. Called for each new request, as it takes longer than a step may."""
        model = self._model()
        assert model is not None
        self._modules = [weakref.ref(m) for m in model.modules()]
        places = [(d, name) for m in model.modules() for d in (m._parameters, m._buffers) for name in d]
        self._places = [(d, name) for d, name in places if d[name] is not None]

    def read(self) -> tuple[Any, ...]:
        """Equal for two steps if one may stand for the other."""
        model = self._model()
        assert model is not None
        config = getattr(model, "config", None)
        device = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        modes = (device, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        flags = tuple(getattr(config, name, None) for name in _FLAGS)
        training = any(m.training for m in self._live())
        return modes, flags, training, tuple([0 if d.get(n) is None else d[n].data_ptr() for d, n in self._places])

    def is_hooked(self) -> bool:
        """Does anyone but us have a forward hook on a module, or on all modules of the process?"""
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return True
        for module in self._live():
            for name in _HOOKS:
                found = getattr(module, name)
                if found and any(type(hook) is not self._own for hook in found.values()):
                    return True
        return False

    def _live(self) -> list[nn.Module]:
        return [m for ref in self._modules if (m := ref()) is not None]
