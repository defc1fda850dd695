"""Which module of the model a graph runs for, told by the weights that it is given.

Dynamo compiles the function of a layer once and runs the graph for all layers, with their weights as inputs. What a plan says of
a layer must then be looked up at each call.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from tsa_compile.watched import is_module_tensor


class WeightNames:
    """Weight or buffer -> its paths in the model; several if it is shared."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._paths: Any = WeakIdKeyDictionary()

    def of(self, x: Any) -> list[str]:
        """The paths of a tensor; none if it is not the model's. The model is read anew for a tensor that is not known."""
        if not isinstance(x, torch.Tensor):
            return []
        if x not in self._paths:
            self._read()
        found: list[str] = self._paths.get(x, [])
        return found

    def _read(self) -> None:
        model = self._model()
        self._paths = WeakIdKeyDictionary()
        for named in () if model is None else (model.named_parameters, model.named_buffers):
            for path, x in named(remove_duplicate=False):
                self._paths.setdefault(x, []).append(path)


@dataclasses.dataclass(frozen=True)
class Witness:
    """An input of a graph that tells the module of a site: the weight `module` + `suffix` when the graph was traced.

    Args:
        position: among the graph's inputs.
        suffix: what follows the part that the site's path and the weight's path have in common.
        rest: what follows it in the site's path.
    """

    position: int
    suffix: str
    rest: str

    def module(self, paths: list[str]) -> str | None:
        """The site's module now, from the weight's paths now; None if they do not say."""
        owners = {path.removesuffix(self.suffix) for path in paths if path.endswith(self.suffix)}
        return owners.pop() + self.rest if len(owners) == 1 else None


def find_witness(module: str, gm: fx.GraphModule, inputs: Sequence[Any], names: WeightNames) -> Witness | None:
    """The weight nearest to `module` among a graph's inputs; None if there is none below a module that both are in."""
    best: tuple[int, Witness] | None = None
    site = module.split(".")
    for position, (node, x) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if not is_module_tensor(node):
            continue
        paths = names.of(x)
        weight = paths[0].split(".") if len(paths) == 1 else []
        common = next((n for n, (a, b) in enumerate(zip(site, weight, strict=False)) if a != b), min(len(site), len(weight)))
        if common and (best is None or common > best[0]):
            suffix, rest = (".".join(["", *parts[common:]]) if parts[common:] else "" for parts in (weight, site))
            best = (common, Witness(position, suffix, rest))
    return best[1] if best else None


def name_modules(gm: fx.GraphModule, model: nn.Module | None) -> None:
    """Give the modules of a Dynamo graph their names in `model`; Dynamo names them from the frame in which the graph begins."""
    names = {} if model is None else {str(id(module)): name for name, module in model.named_modules()}
    for node in gm.graph.nodes if names else ():
        stack = node.meta.get("nn_module_stack") or {}  # {id of a module, maybe "@" and a number: (path, class)}
        node.meta["nn_module_stack"] = {k: (names.get(k.split("@")[0], path), *kind) for k, (path, *kind) in stack.items()}
