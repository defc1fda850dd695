"""`tsa-compile bench prefill`: a Llama of real size and random weights, dense against transformed, end to end."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from tsa_compile import api
from tsa_compile.kernels.types import Operands
from tsa_compile.passes.site import AttentionSite, MaskFacts
from tsa_compile.plan import default_policy
from tsa_compile.policies.base import Policy, call
from tsa_compile.recorder import record_kept
from tsa_compile.tools.bench.timing import GRAPHED_BELOW, graph_ms, median_ms

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

    `dense_attention`, `sparse_attention`: the part of all layers' attention in them, timed alone on one layer's shapes.
    """

    length: int
    dense: float
    sparse: float
    dense_memory: int
    sparse_memory: int
    dense_attention: float
    sparse_attention: float
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
    model: Any, lengths: list[int], policy: Policy | None, repeats: int = 3, compiler: str = "inductor"
) -> list[PrefillRow]:
    """Prefill of each length: dense (SDPA), then `transform(model, policy)`.

    policy: None for the default plan, which runs dense where its policy does not pay.
    compiler: "inductor", for both; or "eager": the dense model as it is, and the transformed graphs without Inductor.
    The dense model is compiled layer by layer: compiled as a whole, transformers gives SDPA a mask [1, 1, L, L] in place of
    `is_causal`, which is slower and takes 32 GiB at 131,072 tokens.
    """
    dense = {}
    torch._dynamo.reset()
    if compiler == "inductor":
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    for length in lengths:
        dense[length] = _time(model, length, repeats)
        print(f"dense, {length} tokens: {dense[length][0]:.1f} ms", flush=True)
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    torch._dynamo.reset()
    api.transform(model, policy, compiler=compiler)
    rows = []
    for length in lengths:
        sparse = _time(model, length, repeats)
        with record_kept() as kept:
            _prefill(model, length)
        shares, report = kept.shares(), api.report(model)
        last = [s for s in report.sites if s.graph == report.graphs - 1]
        mean = sum(shares) / len(shares) if shares else 1.0
        replaced = sum(s.replaced for s in last)
        times, memory = (dense[length][0], sparse[0]), (dense[length][1], sparse[1])
        attention = attention_ms(model.config, length, policy or default_policy())
        rows.append(PrefillRow(length, *times, *memory, *attention, mean, replaced, len(last)))
    api.restore(model)
    return rows


def attention_ms(config: Any, length: int, policy: Policy) -> tuple[float, float]:
    """Milliseconds of all layers' attention, dense (SDPA) and by `policy`, on random q, k and v of one layer's shapes.

    Short prompts' from CUDA graphs, as in a model the GPU is busy while a layer's kernels are launched.
    """
    dim = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(1, length, h, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in heads)
    site = AttentionSite.of(Operands(q, k, v), MaskFacts(causal=True))
    dense = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    sparse = lambda: policy.attend(call, site, policy.select(call, site, None))  # noqa: E731
    layers, timed = config.num_hidden_layers, graph_ms if length < GRAPHED_BELOW else median_ms
    return layers * timed(dense, 3), layers * timed(sparse, 3)


@torch.no_grad()
def _prefill(model: Any, length: int) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (1, length), device="cuda", generator=g)
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def _time(model: Any, length: int, repeats: int) -> tuple[float, int]:
    torch.cuda.reset_peak_memory_stats()
    return median_ms(lambda: _prefill(model, length), repeats, warmup=1), torch.cuda.max_memory_allocated()
