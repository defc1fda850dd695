"""The backend in a real engine on the CPU, against vLLM's own: the same tokens where the policy reads every key.

Sparse rows are counted, so that an engine which hands all of them to the parent fails.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.vllm.engines import engine, prompts, tokens
from tsa_compile.frontends.vllm.counts import BY_LAYER

EVERY_KEY = {"policy": "BlockSparse", "alpha": 0.0, "last_dense": 0, "min_context": 0}
SPARSE = {"policy": "BlockSparse", "alpha": 0.5, "last_dense": 0, "window": 1, "sinks": 0, "min_context": 0}
LAYERS = 3
WHOLE = [700, 331, 150, 40, 128, 1100]
CHUNK = 256  # tokens of a step


def counted():
    """(sparse rows, sparse tokens) since the last call; the same in all layers."""
    got = {(c.sparse_requests, c.sparse_tokens) for c in BY_LAYER.values()}
    assert len(BY_LAYER) == LAYERS
    assert len(got) == 1
    BY_LAYER.clear()
    return got.pop()


@pytest.fixture(autouse=True)
def _clean():
    BY_LAYER.clear()


@pytest.fixture(scope="module")
def stock(model):
    """vLLM's own tokens for the prompts of the tests below."""
    with engine(model, custom=False) as llm:
        return {"whole": tokens(llm, prompts(WHOLE)), "stress": tokens(llm, stress(), 40)}


def stress():
    """24 requests of 20 to 500 tokens, the first 96 of them shared."""
    return prompts([97 + (i * 137) % 400 for i in range(24)], seed=1, shared=96)


def test_reading_every_key_gives_the_engines_own_tokens(model, stock):
    with engine(model, EVERY_KEY) as llm:
        assert tokens(llm, prompts(WHOLE)) == stock["whole"]
        assert counted() == (4, 700 + 331 + 150 + 1100)
        again = tokens(llm, prompts(WHOLE))  # from the prefix cache: only the ends of prompts are new, and they are short
        assert again == stock["whole"]
        assert not BY_LAYER
        longer = [{"prompt_token_ids": x["prompt_token_ids"] + y["prompt_token_ids"]} for x, y in
                  zip(prompts(WHOLE[:2]), prompts([200, 300], seed=3), strict=True)]  # fmt: skip
        cached = tokens(llm, longer)
        assert counted() == (2, sum(len(x["prompt_token_ids"]) for x in longer) - (700 // 32 + 331 // 32) * 32)
    with engine(model, custom=False) as llm:
        assert tokens(llm, longer) == cached


def test_chunks_mixed_batches_and_preemption(model, stock):
    """Few blocks and small steps: chunks of prompts run beside decodes, requests are thrown out and start again."""
    with engine(model, EVERY_KEY, max_num_batched_tokens=CHUNK, max_model_len=1184, num_gpu_blocks_override=42) as llm:
        assert tokens(llm, prompts(WHOLE)) == stock["whole"]
        rows, count = counted()
        assert rows >= 8
        assert count > 1500
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempted, preempt = [], scheduler._preempt_request
        scheduler._preempt_request = lambda request, *rest, **more: (preempted.append(request), preempt(request, *rest, **more))[
            1
        ]
        assert tokens(llm, stress(), 40) == stock["stress"]
        assert preempted
        assert counted()[0] > 5


def test_a_sparse_plan_is_sparse(model, stock):
    with engine(model, SPARSE) as llm:
        got = tokens(llm, prompts(WHOLE))
        assert counted() == (4, 700 + 331 + 150 + 1100)
        short = [i for i, n in enumerate(WHOLE) if n <= 128]
        assert [got[i] for i in short] == [stock["whole"][i] for i in short]
        assert got[0] != stock["whole"][0] or got[5] != stock["whole"][5]
        assert tokens(llm, prompts(WHOLE)) == got  # cached keys are those of the same plan


def test_the_engines_own_backend_is_left_alone(model):
    """vLLM on CPU takes our class whatever was asked: without CUSTOM it must do nothing."""
    with engine(model, custom=False) as llm:
        tokens(llm, prompts([300]))
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        attention = worker.worker.model_runner.model.model.layers[0].self_attn.attn
        assert type(attention.impl).__name__ == "CpuImpl"
        assert attention.impl.tsa is None
    assert not BY_LAYER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention_backend="CUSTOM", additional_config={"tsa": {"alhpa": 1}}), "tsa has no option 'alhpa'"),
        (dict(additional_config={"tsa": {}}), "add --attention-backend CUSTOM"),
    ],
)
def test_a_wrong_option_is_an_error_before_the_engine(model, options, message):
    from vllm import EngineArgs

    with pytest.raises(ValueError, match=message):
        EngineArgs(model, skip_tokenizer_init=True, **options).create_engine_config()


@pytest.mark.slow
def test_mla_is_an_error_before_the_engine(tmp_path):
    from transformers import DeepseekV2Config
    from vllm import EngineArgs

    DeepseekV2Config(num_hidden_layers=1, architectures=["DeepseekV2ForCausalLM"]).save_pretrained(tmp_path)
    arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True, attention_backend="CUSTOM", max_model_len=512)
    with pytest.raises(ValueError, match="MLA, which backend CUSTOM does not serve"):
        arguments.create_engine_config()


def test_another_version_registers_nothing(monkeypatch):
    import vllm.version
    from vllm.v1.attention.backends import registry

    from tsa_compile.frontends.vllm import plugin

    said = []
    monkeypatch.setattr(vllm.version, "__version__", "0.99.0")
    monkeypatch.setattr(registry, "register_backend", lambda *args: pytest.fail("registered"))
    monkeypatch.setattr(plugin.log, "warning", lambda text, *args: said.append(text % args))
    plugin.register()
    assert said == ["tsa_compile is for vLLM 0.26 to 0.33, not 0.99.0: attention backend CUSTOM is not registered"]
