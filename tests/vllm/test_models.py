"""Layers that a policy does not take are the engine's own, in models of transformers: windows, softcap, sinks. Minutes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from tests.vllm.engines import VOCABULARY, engine, prompts, tokens
from tsa_compile.frontends.vllm.counts import BY_LAYER

pytestmark = pytest.mark.slow
EVERY_KEY = {"policy": "BlockSparse", "alpha": 0.0, "last_dense": 0, "min_context": 0}
SIZES = dict(vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=4096, initializer_range=0.08)  # fmt: skip


def gemma3():
    """Two layers of a window of 96, one of full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=96, layer_types=kinds, query_pre_attn_scalar=32))


def gemma2():
    """Softcap in every layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=96, query_pre_attn_scalar=32, attn_logit_softcapping=20.0))


def gpt_oss():
    """Sinks in every layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, sliding_window=96, num_local_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize(
    ("make", "sparse", "reasons"),
    [
        (gemma3, [2], ["sliding window of 96: already local"] * 2 + [""]),
        (gemma2, [], ["softcap of 20.0"] * 3),
        (gpt_oss, [], ["attention with sinks"] * 3),
    ],
)
def test_other_layers_are_dense_with_the_reason(make, sparse, reasons, tmp_path):
    import vllm

    if make is gpt_oss and vllm.__version__ < "0.32":
        pytest.skip(f"the CPU engine of vLLM {vllm.__version__} refuses these experts by itself")
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    given = prompts([500, 333, 20])
    with engine(str(tmp_path), custom=False) as llm:
        want = tokens(llm, given)
    BY_LAYER.clear()
    with engine(str(tmp_path), EVERY_KEY, max_num_batched_tokens=300) as llm:
        assert tokens(llm, given) == want
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        attentions = worker.worker.model_runner.compilation_config.static_forward_context
        decided = [layer.impl.tsa for layer in attentions.values() if hasattr(layer, "impl")]
    assert [x.reason for x in sorted(decided)] == reasons
    assert sorted(BY_LAYER) == [f"model.layers.{i}.self_attn" for i in sparse]
    assert all(counts.sparse_tokens > 500 for counts in BY_LAYER.values())
