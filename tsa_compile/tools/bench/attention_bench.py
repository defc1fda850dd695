"""`tsa-compile bench attention`: each stage of token-sparse attention against dense attention, checked before it is timed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from tsa_compile.kernels.attend.tokens.definition import sparse_attention_rows
from tsa_compile.kernels.attend.tokens.engines import can_pack, flash4_missing
from tsa_compile.policies.token_sparse import Completion, TokenSparse
from tsa_compile.tools.bench.cases import AttentionCase
from tsa_compile.tools.bench.inputs import forced, structured
from tsa_compile.tools.bench.stages import packed_stages, selection_stages
from tsa_compile.tools.bench.timing import GRAPHED_BELOW, graph_ms, median_ms, peak_extra_bytes

Tensor = torch.Tensor
Selected = tuple[Tensor, Tensor, Tensor]  # indices, counts, heavy
Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = 1e-2  # relative error in bf16
COMPLETION = Completion()
POLICY = TokenSparse(completion=COMPLETION)


@dataclasses.dataclass(frozen=True)
class AttentionRow:
    """One case: times in milliseconds, extra memory in bytes, the largest relative error found before timing.

    `sparse` has, per engine: selection and attention together, without the strip; `completed` the same with it.
    `*_in_graph`: from CUDA graphs, of the dense forms below GRAPHED_BELOW tokens. `stages`: parts of `sparse`, see stages.py.
    """

    case: AttentionCase
    select: float
    select_in_graph: float
    structured_keep: float
    dense: dict[str, float]
    dense_in_graph: dict[str, float]
    sparse: dict[str, float]
    sparse_in_graph: dict[str, float]
    completed: dict[str, float]
    stages: dict[str, float]
    memory: dict[str, int]
    error: dict[str, float]

    @property
    def timed(self) -> tuple[dict[str, float], dict[str, float]]:
        """(dense, sparse): from CUDA graphs where both are, at lengths at which launches would hide what kernels take."""
        return (self.dense_in_graph, self.sparse_in_graph) if self.dense_in_graph else (self.dense, self.sparse)

    @property
    def best(self) -> str:
        """The engine that takes least."""
        sparse = self.timed[1]
        return min(sparse, key=sparse.__getitem__)

    def speedup(self, dense: str) -> float:
        return self.timed[0][dense] / self.timed[1][self.best]


def load_peer(path: str) -> Dense:
    """The function `attention(q, k, v)` of a Python file; q `[B, H, L, D]`, k and v `[B, Hk, L, D]`, causal.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no Python file or has no such function.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"peer {path}: no such file")
    spec = importlib.util.spec_from_file_location("tsa_peer", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"peer {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "attention"):
        raise ValueError(f"peer {path}: has no function attention(q, k, v)")
    found: Dense = module.attention
    return found


def dense_forms(q: Tensor, v: Tensor, peers: Mapping[str, Dense]) -> dict[str, Dense]:
    """SDPA as PyTorch chooses it, FlashAttention-4 where it is installed, and the user's peers."""
    forms: dict[str, Dense] = {"SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)}
    if flash4_missing(q, v) is None:
        from flash_attn.cute import flash_attn_func

        forms["FlashAttention-4"] = lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return {**forms, **peers}


def bench_case(case: AttentionCase, peers: Mapping[str, Dense], repeats: int | None = None) -> AttentionRow:
    """Check, then time, one case on the current GPU; by default 9 times, and 5 times from 64K tokens on.

    Raises:
        RuntimeError: a result is wrong; nothing is timed then.
    """
    repeats = repeats or (9 if case.length < 65536 else 5)
    q, k, v = structured(case.batch, case.heads, case.kv_heads, case.length, case.dim, torch.bfloat16, "cuda")
    scale = case.dim**-0.5
    numbers = (POLICY.coverage, POLICY.window, POLICY.pool, POLICY.min_tokens)

    def select() -> Selected:
        return torch.ops.tsa.select_tokens(q, k, None, None, scale, *numbers, COMPLETION.heavy)

    chosen = select()
    selection = forced(last_query_scores_of(q, k, scale), case.keep, POLICY.window, COMPLETION.heavy)
    engines = ["fused", *(["packed"] if can_pack(q, k, v) else [])]
    runs = {(e, s): attend(q, k, v, selection, scale, e, s) for e in engines for s in (False, True)}
    error = {f"{e}{' completed' if s else ''}": _check(q, k, v, selection, scale, e, s, run) for (e, s), run in runs.items()}
    plain = {e: runs[e, False] for e in engines}

    def whole(attend: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: (select(), attend())[1]

    stages = selection_stages(q, k, scale, POLICY, repeats)
    if "packed" in engines:
        stages |= packed_stages(q, k, v, *selection[:2], scale, repeats)
    dense = {name: partial(f, q, k, v) for name, f in dense_forms(q, v, peers).items()}
    return AttentionRow(
        case,
        select=median_ms(select, repeats),
        select_in_graph=graph_ms(select, repeats),
        structured_keep=chosen[1].float().mean().item() / case.length,
        dense={name: median_ms(run, repeats) for name, run in dense.items()},
        dense_in_graph={name: graph_ms(run, repeats) for name, run in dense.items() if case.length < GRAPHED_BELOW},
        sparse={e: median_ms(whole(run), repeats) for e, run in plain.items()},
        sparse_in_graph={e: graph_ms(whole(run), repeats) for e, run in plain.items()},
        completed={e: median_ms(whole(runs[e, True]), repeats) for e in engines},
        stages=stages,
        memory={e: peak_extra_bytes(run) - q.nbytes // q.shape[-1] * v.shape[-1] for e, run in plain.items()},
        error=error,
    )


def last_query_scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What the last queries give each key, `[B, H, L]`: the scores that selections are forced by."""
    from tsa_compile.kernels.score.last_queries.host import last_query_scores

    dummy = torch.empty(1, dtype=torch.int32, device=q.device)
    return last_query_scores(q, k, dummy, dummy, False, scale, POLICY.window)


def attend(q: Tensor, k: Tensor, v: Tensor, selection: Selected, scale: float, engine: str, strip: bool) -> Callable[[], Tensor]:
    """Token-sparse attention of a given selection, as a call that can be timed."""
    tail = _strip_arguments(selection, strip)
    return lambda: torch.ops.tsa.sparse_attention(q, k, v, *tail[0], None, None, scale, *tail[1], 0, engine)[0]


def _strip_arguments(selection: Selected, strip: bool) -> tuple[Selected, tuple[int, int]]:
    indices, counts, heavy = selection
    if strip:
        return selection, (COMPLETION.window, COMPLETION.sinks)
    return (indices, counts, heavy[..., :0]), (0, 0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selected,
    scale: float,
    engine: str,
    strip: bool,
    run: Callable[[], Tensor],
) -> float:
    """Relative error of sampled rows against the definition in float32."""
    rows = torch.linspace(0, q.shape[2] - 1, 48, device=q.device).long()
    given, widths = _strip_arguments(selection, strip)
    expected = sparse_attention_rows(q, k, v, *given, None, scale, *widths, rows)
    error = ((run()[:, :, rows].float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"engine {engine!r}: relative error {error:.2e} is above {TOLERANCE:.0e}; nothing is timed")
    return error
