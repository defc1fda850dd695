"""How much of a prompt an engine reads, and the alpha with which it reads a given share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tsa_compile.tools.bench.serving_requests import ask


def set_alpha(llm: Any, value: float) -> list[Any]:
    """Give all sparse layers of an engine in this process this alpha; the layers' implementations, as they were."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    sparse = [x.impl for x in context.values() if getattr(getattr(x, "impl", None), "tsa", None) and x.impl.tsa.policy]
    before = [(impl, impl.tsa) for impl in sparse]
    for impl in sparse:
        impl.tsa = impl.tsa._replace(policy=dataclasses.replace(impl.tsa.policy, alpha=value))
    if not before:
        raise RuntimeError("no layer of this engine has an alpha: none is sparse, or they are in other processes")
    return before


@contextlib.contextmanager
def with_alpha(llm: Any, value: float | None) -> Iterator[None]:
    """With this alpha; None: as it is."""
    before = [] if value is None else set_alpha(llm, value)
    try:
        yield
    finally:
        for impl, layer in before:
            impl.tsa = layer


def alpha(llm: Any, length: int, pairs: float) -> dict[str, Any]:
    """Set the alpha with which a prompt of this length reads a share `pairs` of its pairs of tokens, to a tenth: by bisection."""
    low, high, tried = 0.0, 1.0, list[tuple[float, float]]()
    for _ in range(12):  # random weights attend almost evenly: alpha is then near 1
        middle = (low + high) / 2
        set_alpha(llm, middle)
        share, _ = read_share(lambda: ask(llm, [length], 1))
        assert share is not None
        tried.append((middle, share))
        if abs(share - pairs) < 0.1 * pairs:
            break
        low, high = (middle, high) if share > pairs else (low, middle)
    best, share = min(tried, key=lambda x: abs(x[1] - pairs))
    set_alpha(llm, best)
    return {"alpha": best, "pairs": share, "tried": tried}


def read_share(request: Callable[[], Any]) -> tuple[float | None, Any]:
    """Share of the causal pairs of key blocks and row blocks that sparse rows read in a request, None without; and its answer."""
    from tsa_compile.kernels.common.row_blocks import KEYS, ROWS
    from tsa_compile.policies.block_sparse import BlockSparse

    original, read, visible = BlockSparse.select, [], 0

    def counted(self: BlockSparse, emit: Any, site: Any, state: Any) -> Any:
        nonlocal visible
        chosen = original(self, emit, site, state)
        assert chosen is not None  # vLLM's sites name no length below which every key is read
        lists, row_blocks = chosen.bits.shape[1:3]
        first = (site.k_len - site.q_len) // ROWS
        visible += lists * sum((first + r + 1) * ROWS // KEYS for r in range(row_blocks))
        read.append(sum(((chosen.bits >> bit) & 1).sum() for bit in range(64)))
        return chosen

    with mock.patch.object(BlockSparse, "select", counted):
        answers = request()
    return float(sum(int(x) for x in read)) / visible if visible else None, answers
