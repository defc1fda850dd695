"""Before the first request: a plan's graphs are traced, and its kernels compiled, by calls with random tokens.

No length compiles a kernel, but a few things choose among kernels: whether there is a mask of padding; the batch, by how many
programs fill the GPU; and lengths that a policy or a kernel names (`Policy.kernel_lengths`, `CHUNK`), or from which on a policy
pays (`pays.lengths`). `cells` has a batch and a length for each of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsa_compile import pays
from tsa_compile.dynamo import called
from tsa_compile.interface.front import front_of
from tsa_compile.kernels.common.compiled import compiled_kernels
from tsa_compile.kernels.select.tokens.host import CHUNK
from tsa_compile.progress import progress
from tsa_compile.session import attached

if TYPE_CHECKING:
    from rich.console import Console

    from tsa_compile.plan import Plan

Inputs = Callable[[int, int], Mapping[str, Any]]
SHORT = 320  # tokens: more than the last 128 rows and a block before them
MAX_BATCH = 8
_NEW_TOKENS = 3  # the prefill's, and two steps


@dataclasses.dataclass(frozen=True)
class Warmed:
    """What a warm-up did.

    Args:
        calls: of the model.
        kernels: that Triton compiled, or found in its cache folder.
        seconds: in all.
    """

    calls: int
    kernels: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.kernels} kernels compiled or loaded, in {self.calls} calls and {self.seconds:.1f} s"


def warm(
    model: nn.Module,
    max_batch: int = MAX_BATCH,
    max_tokens: int | None = None,
    inputs: Inputs | None = None,
    console: Console | None = None,
) -> Warmed:
    """Run a transformed model on random tokens, so that no later call of up to `max_batch` rows compiles a kernel.

    A language model of transformers runs with and without a mask of padding, and generates a few tokens, which also traces the
    graphs of such calls. A CUDA graph is still recorded for each request's buffers, and a call with other arguments than these
    (a mask of its own, hidden states) may be traced anew. Kernels stay in Triton's cache folder, where later processes find
    them; traces do not.

    Args:
        model: as `transform` left it; on the device, and in the dtype, in which it will serve.
        max_batch: rows of the largest batch.
        max_tokens: of the longest prompt; None: as many as the model has positions. Lengths behind the last that chooses among
            kernels are not run.
        inputs: (batch, tokens) -> the arguments of a call, for a model that takes no `input_ids`.
        console: where a progress bar is shown; None: nowhere.

    Raises:
        ValueError: the model is not transformed; `max_batch` or `max_tokens` below 1; or it needs `inputs`.
    """
    plan = _plan_of(model)
    for name, value in (("max_batch", max_batch), ("max_tokens", max_tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    device = next(model.parameters(), torch.empty(0)).device
    wanted = cells(plan, max_batch, _longest(model, max_tokens), device)
    start = time.perf_counter()
    with torch.no_grad(), compiled_kernels() as kernels, progress(console, console is not None) as begin:
        calls = [call for cell in wanted for call in _calls(model, *cell, inputs)]
        advance = begin("warming up", len(calls))
        for call in calls:
            call()
            advance()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Warmed(len(calls), len(kernels), time.perf_counter() - start)


def cells(plan: Plan, max_batch: int, max_tokens: int, device: torch.device) -> list[tuple[int, int]]:
    """(batch, tokens) of the calls: all batches at the lengths that policies name, one row where kernels alone name it."""
    edges = {n for policy in plan.policies() for n in policy.kernel_lengths()}
    if plan.where == "pays":
        edges |= {n - 1 for n in pays.lengths({policy.name for policy in plan.policies()}, device)}
    lengths = sorted({min(n, max_tokens) for edge in edges for n in (edge, edge + 1)} | {min(SHORT, max_tokens)})
    found = [(batch, length) for length in lengths for batch in batches(max_batch)]
    return found + [(1, CHUNK + 1)] * (max_tokens > CHUNK)


def batches(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`. From 2 on each is at most half as large again as the one before: kernels that are
    chosen by the next power of two of the programs a GPU has room for, rounded down, are all met."""
    powers = [1 << n for n in range(most.bit_length())]
    return sorted({n for p in powers for n in (p, p + p // 2) if n <= most} | {most})


def _calls(model: nn.Module, batch: int, tokens: int, inputs: Inputs | None) -> Iterator[Callable[[], Any]]:
    if inputs is not None:
        yield lambda: model(**inputs(batch, tokens))
        return
    config = getattr(model, "config", None)
    if config is None or "input_ids" not in inspect.signature(called(model).forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no input_ids: warm() needs inputs, (batch, tokens) -> its arguments")
    ids = _random_tokens(config.get_text_config().vocab_size, batch, tokens, next(model.parameters()).device)
    if not config.is_encoder_decoder:
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(called(model).forward).parameters else {}
        yield lambda: model(input_ids=ids, **few)
    generate: Any = getattr(model, "generate", None)
    mask = torch.ones_like(ids)
    if generate is None:
        yield lambda: model(input_ids=ids, attention_mask=mask)
    else:
        new = dict(max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
        yield lambda: generate(input_ids=ids, attention_mask=mask, **new)
        if 1 < batch < 4 and tokens > 1:  # a graph of its own: transformers then gives positions, too
            padded = mask.clone()
            padded[0, 0] = 0
            yield lambda: generate(input_ids=ids * padded, attention_mask=padded, **new)


def _random_tokens(vocabulary: int, batch: int, tokens: int, device: torch.device) -> Tensor:
    """int64 `[batch, tokens]`, without a draw from the generators of others."""
    return torch.randint(1, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def _longest(model: nn.Module, max_tokens: int | None) -> int:
    config = getattr(model, "config", None)
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    room = max(1, positions - _NEW_TOKENS) if isinstance(positions, int) else CHUNK + 1
    return room if max_tokens is None else min(max_tokens, room)


def _plan_of(model: nn.Module) -> Plan:
    front, session = front_of(called(model)), attached(model)
    if front is None and session is None:
        raise ValueError(f"{type(model).__name__} was not transformed by tsa_compile.transform")
    return session.plan if front is None else front.plan  # type: ignore[union-attr]
