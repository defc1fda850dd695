"""One transformers model under a plan by its attention interface: nothing is traced, and no length or device breaks a graph."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import torch
from torch import nn

from tsa_compile.interface.attention import Front, register_front
from tsa_compile.plan import Plan, without_session
from tsa_compile.policies.base import Policy
from tsa_compile.report import Report, SiteReport
from tsa_compile.rules import layer_number

_NUMBERS = itertools.count()
_FRONTS: weakref.WeakKeyDictionary[nn.Module, ModelFront] = weakref.WeakKeyDictionary()


class ModelFront(Front):
    """Answers for one model, and reports. Plans name modules by their real paths.

    Args:
        model: of transformers, one that calls its attention by name.
        plan: with policies for prefill alone; decode steps stay as the model has them.

    Raises:
        ValueError: the model has no such interface; the plan has a policy for decode steps, or a rule that matches no module.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        if plan.decodes:
            raise ValueError('front="interface" has no decode steps: name policies for prefill alone, or use front="trace"')
        super().__init__(without_session(plan.bind(model)))
        self.name = f"tsa-{next(_NUMBERS)}"
        self._paths = weakref.WeakKeyDictionary({module: name for name, module in model.named_modules()})
        self._sites: dict[tuple[str, str | None, str | None], SiteReport] = {}
        self._lock = threading.Lock()
        self._before = [(config, config._attn_implementation) for config in _configs(model)]
        register_front(self, self.name)
        model.set_attn_implementation(self.name)  # type: ignore[operator]
        if any(config._attn_implementation != self.name for config, _ in self._before):
            self.give_back()
            raise ValueError(f"{type(model).__name__} does not call its attention by name, as front='interface' needs it")

    def give_back(self) -> None:
        """The model's own attention again."""
        for config, own in self._before:
            config._attn_implementation = own

    def path(self, module: nn.Module) -> str | None:
        return self._paths.get(module)

    def tell(self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, policy: Policy | None, reason: str | None) -> None:
        if q.shape[2] == 1:
            return
        path, name = self.path(module), None if policy is None else policy.name
        sizes = str(q.shape[2]), str(k.shape[2])
        with self._lock:
            old = self._sites.get((path or "", name, reason))
            if old is not None and (old.q_len, old.k_len) == sizes:
                return
            q_len, k_len = sizes if old is None else ("any", "any")
            self._sites[path or "", name, reason] = SiteReport(
                graph=0, layer=layer_number(path or "") or 0, module=path or "", heads=f"{q.shape[1]}/{k.shape[1]}",
                q_len=q_len, k_len=k_len, policy=name or "Dense", replaced=reason is None, reason=reason or "",
            )  # fmt: skip

    @property
    def report(self) -> Report:
        """What became of the calls so far, each module and outcome once."""
        with self._lock:
            return Report(list(self._sites.values()), front="interface")


def take(model: nn.Module, plan: Plan) -> None:
    """Put the model's attention under the plan.

    Raises:
        ValueError: see ModelFront.
        RuntimeError: it is transformed or compiled already.
    """
    if front_of(model) is not None or model._compiled_call_impl is not None:
        raise RuntimeError("the model is transformed or compiled already; call tsa_compile.restore(model) before")
    if not callable(getattr(model, "set_attn_implementation", None)):
        raise ValueError(f"{type(model).__name__} is no transformers model, as front='interface' needs it: use front='trace'")
    _FRONTS[model] = ModelFront(model, plan)


def front_of(model: nn.Module) -> ModelFront | None:
    return _FRONTS.get(model)


def give_back(model: nn.Module) -> None:
    """Undo `take`."""
    _FRONTS.pop(model).give_back()


def is_spread(model: nn.Module) -> bool:
    """Do hooks of accelerate move tensors between its layers, as `device_map` over several devices has it?

    Each hook breaks the graph, and masks reach the layers as data.
    """
    return any(hasattr(module, "_hf_hook") for module in model.modules() if module is not model)


def _configs(model: nn.Module) -> list[Any]:
    """Configurations of the model and of the models in it, each once, the outer ones first."""
    configs = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")]
    return list({id(config): config for config in configs}.values())
