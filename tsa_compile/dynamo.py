"""What we ask of Dynamo around a model's call: code of its own, room for its graphs, guards on hooks; and what it skips."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode, ProxyTorchDispatchMode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tsa_compile.cache.names import CACHES
from tsa_compile.passes.site import VERIFY_ROWS

_CALLS = itertools.count()
_MIN_GRAPHS = 64
_BY_TOKEN = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"})  # dimension 1: tokens
_FIRST_FILE = re.compile(r'File "([^"]+)", line \d+, in (\S+)')


def isolated(model: nn.Module) -> Callable[..., Any]:
    """The model's call as a function with a code object of its own.

    Dynamo keeps compiled code, and counts recompilations, by code object; a model's forward is shared by all models of its class,
    which would use up each other's limit and then run dense without a word.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    # The name, too: Dynamo also remembers by file, line and name which numbers changed, and makes inputs of them.
    call.__code__ = call.__code__.replace(co_name=f"call_{next(_CALLS)}")
    return call


def called(model: nn.Module) -> nn.Module:
    """The module whose call is compiled: of a PEFT wrapper its base model, which the wrapper's generate() calls directly."""
    base = getattr(model, "get_base_model", None)
    return base() if base is not None and type(model).__module__.startswith("peft.") else model


def first_frame(gm: fx.GraphModule) -> tuple[str, str]:
    """(file, function) of the frame that a Dynamo graph begins in; empty if unknown."""
    traces = (node.meta.get("stack_trace") for node in gm.graph.nodes)
    found = next((_FIRST_FILE.search(trace) for trace in traces if trace), None)
    return (found[1], found[2]) if found else ("", "")


def begins_at_root(gm: fx.GraphModule) -> bool:
    """Does a graph begin in `isolated(model)`? Then it belongs to that model alone; others may run for several of its modules."""
    return first_frame(gm)[0] == __file__


def room(model: nn.Module) -> int:
    """Graphs that may be compiled for one function of `model`, beyond which Dynamo would run it as it is.

    A server needs many: prompts and batches, padded or not, with a cache and without, each with fixed and with symbolic sizes.
    A model that is traced layer by layer needs some for each layer, as layers share their code; with accelerate's hooks
    (`device_map`), all modules do.
    """
    kinds = collections.Counter(type(m) for m in model.modules() if next(m.children(), None) is not None)
    hooked = sum(hasattr(m, "_hf_hook") for m in model.modules())
    return max(_MIN_GRAPHS, 4 * max(hooked, *kinds.values(), 0))


def traced_by_others() -> bool:
    """Is this thread being traced, by Dynamo, a non-strict export or make_fx? What other threads do is not asked."""
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return True
    modes = (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())
    return any(isinstance(mode, (PreDispatchTorchFunctionMode, ProxyTorchDispatchMode)) for mode in modes)


def lengths_vary(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Have the number of tokens be a symbol from the first trace on, so that another length needs no second one.

    Only of what transformers names, or of token ids that come first. Short calls are steps over a cache, whose policies take
    a fixed number of query rows, and in a static cache it takes a number to show that they fit. A model that needs a fixed
    length still gets it: Dynamo is asked, not told.
    """
    if any(getattr(kwargs.get(name), "is_compileable", False) for name in CACHES):
        return
    named = [x for name, x in kwargs.items() if name in _BY_TOKEN]
    ids = [x for x in args[:1] if isinstance(x, torch.Tensor) and x.dim() == 2 and not x.is_floating_point()]
    for x in (*ids, *named):
        if isinstance(x, torch.Tensor) and x.dim() >= 2 and x.shape[1] > VERIFY_ROWS:
            torch._dynamo.maybe_mark_dynamic(x, 1)


#: From torch 2.13 on each thread has a configuration of its own.
_BY_THREAD = isinstance(
    getattr(torch._dynamo.config._config["recompile_limit"], "user_override", None),  # type: ignore[attr-defined]
    contextvars.ContextVar,
)


class _Settings:
    """Dynamo's configuration while calls of ours run.

    Where it is one for the whole process, the last call that ends puts the user's back; other threads that compile meanwhile
    see more room and more guards, never fewer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: list[int] = []
        self._before: dict[str, Any] = {}

    @contextlib.contextmanager
    def ours(self, graphs: int) -> Iterator[None]:
        """Room for `graphs` graphs; hooks that are registered later make a graph anew."""
        if _BY_THREAD:
            with torch._dynamo.config.patch(_wider(_now(), graphs)):  # type: ignore[attr-defined]
                yield
            return
        with self._lock:
            if not self._limits:
                self._before = _now()
            self._limits.append(graphs)
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._limits.remove(graphs)
                self._apply()

    def _apply(self) -> None:
        values = _wider(self._before, max(self._limits)) if self._limits else self._before
        for name, value in values.items():
            if getattr(torch._dynamo.config, name) != value:
                setattr(torch._dynamo.config, name, value)


def _now() -> dict[str, Any]:
    names = ("recompile_limit", "accumulated_recompile_limit", "skip_nnmodule_hook_guards")
    return {name: getattr(torch._dynamo.config, name) for name in names}


def _wider(values: dict[str, Any], graphs: int) -> dict[str, Any]:
    return {
        "recompile_limit": max(graphs, values["recompile_limit"]),
        "accumulated_recompile_limit": max(4 * graphs, values["accumulated_recompile_limit"]),
        "skip_nnmodule_hook_guards": False,
    }


settings = _Settings()


class _Skips(logging.Filter):
    """Hears Dynamo say that it hit a limit and runs a function as it is from now on; tells the call of this thread."""

    def __init__(self) -> None:
        super().__init__()
        self._threads = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        tell = getattr(self._threads, "tell", None)
        if tell is not None and str(record.msg).startswith("torch._dynamo hit config."):
            tell(record.getMessage().splitlines()[0])
        return True

    @property
    def in_call(self) -> bool:
        """Does this thread run a call of a `Session`?"""
        return getattr(self._threads, "tell", None) is not None

    @contextlib.contextmanager
    def told_to(self, tell: Callable[[str], None]) -> Iterator[None]:
        before = getattr(self._threads, "tell", None)
        self._threads.tell = tell
        try:
            yield
        finally:
            self._threads.tell = before


skips = _Skips()
logging.getLogger("torch._dynamo.convert_frame").addFilter(skips)
