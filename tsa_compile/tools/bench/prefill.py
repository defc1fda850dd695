"""`tsa-compile bench prefill`: a Llama of real size and random weights, dense against transformed, end to end."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile import api
from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.plan import as_plan, default_policy
from tsa_compile.policies.base import Policy, call
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.recorder import record_kept
from tsa_compile.session import Session, attached
from tsa_compile.tools.bench.timing import GRAPHED_BELOW, graph_ms, in_turns, median_ms

# Llama-3.1-8B (arXiv 2407.21783, table 3)
LLAMA_8B: dict[str, Any] = dict(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
)


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """Times to the first token in milliseconds, peak memory in bytes, share of the tokens kept.

    `dense_attention`, `sparse_attention`: the part of all layers' attention in them, timed alone on one layer's shapes; None
    where the share that is read was forced, which random rows do not show.
    """

    length: int
    dense: float
    sparse: float
    dense_memory: int
    sparse_memory: int
    dense_attention: float
    sparse_attention: float | None
    kept: float
    replaced: int
    sites: int


def build_llama(layers: int) -> Any:
    """A bf16 Llama-3.1-8B of `layers` layers on the GPU, weights drawn at random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": layers}))
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval()


def bench_prefill(
    model: Any, lengths: list[int], policy: Policy | None, repeats: int = 3, compiler: str = "inductor", keep: float | None = None
) -> Iterator[PrefillRow]:
    """Prefill of each length in turns, so that a warmer GPU slows both alike: dense (SDPA), and `transform(model, policy)`.

    policy: None for the default plan, which runs dense where its policy does not pay.
    compiler: "inductor", for both; or "eager": the dense model as it is, and the transformed graphs without Inductor.
    keep: a share of the causal pairs; `BlockSparse` with the `alpha` that reads it runs in place of `policy`.
    The dense model is compiled layer by layer: compiled as a whole, transformers gives SDPA a mask [1, 1, L, L] in place of
    `is_causal`, which is slower and takes 32 GiB at 131,072 tokens.
    """
    torch._dynamo.reset()
    dense = with_same_weights(model)
    if compiler == "inductor":
        for layer in dense.model.layers:
            layer.compile(dynamic=True)
    policies = {n: policy if keep is None else BlockSparse(alpha_that_reads(model, n, keep)) for n in lengths}
    api.transform(model, policy, compiler=compiler)
    for length, chosen in policies.items():
        if keep is not None:
            session_of(model).plan = as_plan(chosen)
        yield _row(dense, model, length, (chosen or default_policy()) if keep is None else None, repeats)
    api.restore(model)


def with_same_weights(model: Any) -> Any:
    """A model of its own over the same parameters and buffers."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def alpha_that_reads(model: Any, length: int, keep: float) -> float:
    """The `alpha` with which `BlockSparse` reads about a share `keep` of the causal pairs; bisected on the first two layers."""
    short = with_same_weights(model)
    short.model.layers = short.model.layers[:2]
    api.transform(short, BlockSparse(0.5), compiler="eager")
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        session_of(short).plan = as_plan(BlockSparse(middle))
        with record_kept(short) as kept:
            _prefill(short, length)
        low, high = (middle, high) if statistics.fmean(kept.shares()) > keep else (low, middle)
    if high == 1:
        raise ValueError(f"at {length} tokens window, sinks and last rows alone are more than {keep:.1%} of the pairs")
    return high


def session_of(model: Any) -> Session:
    """The session of a transformed model."""
    session = attached(model)
    if session is None:
        raise ValueError(f"{type(model).__name__} is not transformed")
    return session


def _row(dense: Any, sparse: Any, length: int, policy: Policy | None, repeats: int) -> PrefillRow:
    works = [functools.partial(_prefill, model, length) for model in (dense, sparse)]
    dense_memory, sparse_memory = map(_peak, works)
    calls = max(repeats, 32768 // length)  # a short prompt's calls vary more
    dense_ms, sparse_ms = in_turns(works, calls, warmup=1)
    with record_kept(sparse) as kept:
        _prefill(sparse, length)
    shares, report = kept.shares(), api.report(sparse)
    last = [s for s in report.sites if s.graph == report.graphs - 1]
    mean, replaced = statistics.fmean(shares or [1.0]), sum(s.replaced for s in last)
    of_dense, of_sparse = attention_ms(sparse.config, length, policy)
    print(f"{length} tokens: dense {dense_ms:.2f} ms, transformed {sparse_ms:.2f} ms, {mean:.1%} kept", flush=True)
    return PrefillRow(length, dense_ms, sparse_ms, dense_memory, sparse_memory, of_dense, of_sparse, mean, replaced, len(last))


def _peak(work: Callable[[], Any]) -> int:
    """Bytes of device memory in use at the peak of a call. One before it compiles what there is to compile."""
    work()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def attention_ms(config: Any, length: int, policy: Policy | None) -> tuple[float, float | None]:
    """Milliseconds of all layers' attention, dense (SDPA) and, if given, by `policy`, on random q, k, v of one layer's shapes.

    Short prompts' from CUDA graphs, as in a model the GPU is busy while a layer's kernels are launched.
    """
    dim = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(1, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in heads)
    site = AttentionSite.of(Operands(q, k, v), MaskFacts(causal=True))
    dense = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    layers, timed = config.num_hidden_layers, graph_ms if length < GRAPHED_BELOW else median_ms
    of_dense = layers * timed(dense, 3)
    if policy is None:
        return of_dense, None
    return of_dense, layers * timed(lambda: policy.attend(call, site, policy.select(call, site, None)), 3)


@torch.no_grad()
def _prefill(model: Any, length: int) -> torch.Tensor:
    g = torch.Generator(model.device).manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device, generator=g)
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
