"""Which kernels Triton would compile for calls on a GPU that is not there: the hosts run, launches are taken down.

`python -m tests.kernels.variants CAPABILITY MULTIPROCESSORS POLICY...` prints, for each policy, the launches of random calls that
the calls of a warm-up (`warm_up.cells`) had not: each a kernel with its constants, and the types and alignments of its arguments.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

import tsa_compile as tsa
from tsa_compile.kernels import ops, registry
from tsa_compile.kernels.types import KvView, Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.policies.base import call
from tsa_compile.warm_up import cells

HEADS, KV_HEADS, DIM = 32, 8, 64
MAX_BATCH, MAX_TOKENS, MOST = 6, 9000, 9000  # MOST: tokens of a random call, in all
POLICIES = {
    "BlockSparse": tsa.BlockSparse(),
    "TokenSparse": tsa.TokenSparse(),
    "paper": tsa.TokenSparse.paper(),
    "blocks of tokens": tsa.TokenSparse(inner=tsa.BlockSparse()),
    "Exact": tsa.Exact(),
    "PageSparse": tsa.PageSparse(0.1),
}


class AsOnGpu(TorchFunctionMode):
    """CPU tensors say that they are on a GPU; `tsa` operators run their host functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if func == torch.Tensor.is_cuda.__get__:
            return True
        name = func.name() if isinstance(func, torch._ops.OpOverload) else ""
        if name.startswith("tsa::"):
            with self:
                return on_host(name.removeprefix("tsa::"), args, kwargs)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def on_host(name: str, args: Any, kwargs: Any) -> Any:
    row = next(o for o in ops.OPERATORS if o.name == name)
    if row.arguments is not None:
        args, kwargs = row.arguments(*args, **kwargs), {}
    return registry.resolve(row.host)(*args, **kwargs)


class Launches:
    """Stands for Triton's launches."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.seen: set[tuple[str, ...]] = set()
        self.new: list[tuple[str, ...]] = []
        self._backend = make_backend(GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
        self._binders: dict[Any, Any] = {}

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if kernel not in self._binders:
            self._binders[kernel] = jit.create_function_from_signature(kernel.signature, kernel.params, self._backend)
        bound, kinds, options = self._binders[kernel](*args, **kwargs)
        shown = [f"{n}={bound[n] if kind[0] == 'constexpr' else kind}" for n, kind in zip(bound, kinds, strict=True)]
        key = (kernel.fn.__name__, *shown, *map(str, sorted(options.items())))
        if key not in self.seen:
            self.seen.add(key)
            self.new.append(key)


def attend(policy: Any, batch: int, length: int, padded: bool, decode: bool) -> None:
    """One attention of a model with `length` keys in each row; decode: one query, over buffers with room for more."""
    room = -(-length // 256) * 256 if decode else length

    def rows(heads: int, tokens: int) -> torch.Tensor:
        if decode:
            return torch.empty(batch, heads, tokens, DIM, dtype=torch.bfloat16)
        return torch.empty(batch, tokens, heads, DIM, dtype=torch.bfloat16).transpose(1, 2)

    mask = torch.ones(batch, room, dtype=torch.bool) if padded else None
    x = Operands(rows(HEADS, 1 if decode else length), rows(KV_HEADS, room), rows(KV_HEADS, room), mask)
    site = AttentionSite.of(x, MaskFacts(True, padded=padded), phase="decode" if decode else "prefill")
    if decode:
        view = KvView(None, 1, *(torch.empty(batch, dtype=torch.int32) for _ in range(2)))
    elif padded:
        view = KvView.ordered(*torch.ops.tsa.key_view.default(mask))
    else:
        view = x.view
    site = dataclasses.replace(site, operands=x._replace(view=view))
    policy.attend(call, site, policy.select(call, site, None))


def main(capability: tuple[int, int], processors: int, policy: Any) -> list[tuple[str, ...]]:
    """Launches of random calls that the warm-up's had not."""
    launches, decode = Launches(capability), "decode" in policy.phases
    jit.JITFunction.run = lambda kernel, *args, **kwargs: launches.run(kernel, *args, **kwargs)
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=processors)
    plan = tsa.Plan(decode=policy) if decode else tsa.Plan(prefill=policy)
    rng = random.Random(0)
    lengths = [rng.randrange(2, 3000) for _ in range(24)] + [rng.randrange(3000, MAX_TOKENS) for _ in range(6)]
    asked = [(batch, n) for n in lengths for batch in (1, 2, 3, 5) if batch * n <= MOST]
    with AsOnGpu(), torch.no_grad():
        for batch, length in cells(plan, MAX_BATCH, MAX_TOKENS, torch.device("cuda", 0)):
            for padded in (False, True):
                attend(policy, batch, length, padded, decode)
        assert launches.new, "nothing was launched"
        launches.new.clear()
        for batch, length in asked:
            attend(policy, batch, length, rng.random() < 0.5, decode)
    return launches.new


if __name__ == "__main__":
    major, minor = map(int, sys.argv[1].split("."))
    print(json.dumps({name: main((major, minor), int(sys.argv[2]), POLICIES[name]) for name in sys.argv[3:] or POLICIES}))
