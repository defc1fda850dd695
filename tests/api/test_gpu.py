"""A whole model on a GPU: one graph, exact at coverage 0, captured in a CUDA graph, no kernel compiled for a new length."""

from __future__ import annotations

import pytest
import torch

import tsa_compile as tsa
from tests.api.tiny import tiny_llama

pytestmark = pytest.mark.gpu
SPARSE = tsa.TokenSparse(coverage=0.2, window=64, min_tokens=128, completion=tsa.Completion(64, 4, 64))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def model():
    sizes = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=8192)
    return tiny_llama(num_hidden_layers=2, **sizes).to("cuda", torch.bfloat16)


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length), device="cuda")


@torch.no_grad()
def logits(model, x, **kwargs):
    return model(input_ids=x, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("compiler", ["inductor", "eager"])
def test_prefill_is_one_graph_and_exact_at_coverage_0(model, compiler):
    x = ids(1500, 2)
    dense = logits(model, x)
    options = {"coverage": 0.0, "min_tokens": 64, "window": 64, "compiler": compiler}
    with torch.no_grad():
        sparse = torch.compile(model, backend="tsa", fullgraph=True, options=options)(input_ids=x, use_cache=False).logits
    error = (sparse.float() - dense.float()).norm() / dense.float().norm()
    assert error < 2e-2, error  # bf16 activations through two layers


def test_the_gpu_agrees_with_the_cpu(model):
    x = ids(900, 2)
    tsa.transform(model.float(), SPARSE)
    gpu = logits(model, x)
    tsa.restore(model)
    torch._dynamo.reset()
    tsa.transform(model.cpu(), SPARSE)
    cpu = logits(model, x.cpu())
    assert ((gpu.cpu() - cpu).norm() / cpu.norm()) < 1e-3  # a token on the threshold may fall on either side


@pytest.mark.parametrize("compiler", ["inductor", "eager"])
def test_capture_and_replay(model, compiler):
    """A captured prefill follows new token ids, and computes what a plain call computes, to the bit."""
    tsa.transform(model, SPARSE, compiler=compiler)
    static, other = ids(2000), ids(2000)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            logits(model, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = logits(model, static)
    static.copy_(other)
    graph.replay()
    assert torch.equal(captured, logits(model, other))
    assert len(tsa.report(model).replaced) == 2


def test_ten_lengths_compile_no_kernel_after_two(model):
    from triton import knobs

    from tsa_compile.kernels.select.tokens.device import select_kernel

    compiled = []
    select_kernel.device_caches.clear()  # another test may have compiled it
    tsa.transform(model, SPARSE)
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(info["fn"].name)
    try:
        logits(model, ids(1024)), logits(model, ids(1333))
        assert any("select_kernel" in name for name in compiled)  # the hook works
        compiled.clear()
        for length in (500, 777, 1025, 1400, 1999, 2048, 2500, 3001, 4096, 4100):
            logits(model, ids(length))
    finally:
        knobs.runtime.jit_post_compile_hook = before
    assert compiled == []
    assert tsa.report(model).graphs <= 2


def test_left_padding(model):
    tsa.transform(model.float(), SPARSE)
    short = ids(700)
    x = torch.cat([ids(1000), torch.cat([torch.zeros(1, 300, dtype=torch.long, device="cuda"), short], 1)])
    mask = (x != 0).long()
    together = logits(model, x, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    alone = logits(model, short)
    assert all(s.replaced for s in tsa.report(model).sites)
    assert (together[1, 300:] - alone[0]).norm() / alone.norm() < 1e-3
