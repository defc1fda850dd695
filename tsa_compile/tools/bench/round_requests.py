"""Requests of speculation over a cache of random rows, without a prefill: what `tsa-compile bench round` measures on."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tsa_compile import api
from tsa_compile.cache import Cache
from tsa_compile.generate.cached_steps import CachedSteps
from tsa_compile.generate.drafts import Request
from tsa_compile.generate.token_rows import TokenRows
from tsa_compile.plan import Plan
from tsa_compile.plan_states import states_for
from tsa_compile.session import Session, attached

ROWS_AT_ONCE = 8192  # of the cache, that are filled together


@contextlib.contextmanager
def transformed(model: Any, plan: Plan, compiler: str) -> Iterator[Session]:
    """Inside, the model runs under `plan`, traced anew; afterwards nothing of it is held."""
    torch._dynamo.reset()
    api.transform(model, plan, compiler=compiler)
    session = attached(model)
    assert session is not None
    try:
        with torch.no_grad():
            yield session
    finally:
        api.restore(model)
        del session
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def filled_cache(model: Any, plan: Plan, batch: int, length: int, room: int) -> Any:
    """`length` random rows, as large as normalised ones are, and room for `room` more; with the states that `plan` keeps."""
    config, kinds = model.config.get_text_config(), states_for(plan)
    cache = Cache(model, batch, length + room)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for n, layer in enumerate(cache.layers):
        layer.keep(kinds(n))
        for begin in range(0, length, ROWS_AT_ONCE):
            shape = (batch, config.num_key_value_heads, min(ROWS_AT_ONCE, length - begin), dim)
            layer.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)))
    return cache


def request_over(model: Any, session: Session, cache: Any, new: int, processors: Any = (), sampled: bool = False) -> Request:
    """As `speculative` makes it behind a prefill, of random tokens; `new` may follow. Rows may differ where they can."""
    length = cache.get_seq_length()
    batch = cache.layers[0].settled().keys.shape[0]
    ids = torch.randint(model.config.get_text_config().vocab_size, (batch, length), device=model.device)
    given = {"position_ids": torch.arange(length, device=ids.device).expand(batch, -1)}
    steps = CachedSteps(model, session, cache, given, new)
    steps.look_at_padding()
    return Request(TokenRows(ids, new, 0), steps, session.plan, processors, sampled)


def seconds_of(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Wall seconds a call, of calls one behind another: what the host does hides behind the device where it is faster."""
    start = now(device)
    for _ in range(times):
        work()
    return (now(device) - start) / times


def now(device: torch.device) -> float:
    """The time when the device waits."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
