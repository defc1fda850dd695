"""What the serving bench reads in an engine: the last rows' logits under chunks, a step's size, a task's alpha."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.engines import engine, prompts
from tsa_compile.tools.bench.serving_alpha import alpha, read_share, with_alpha
from tsa_compile.tools.bench.serving_engine import new_weights, steps_of
from tsa_compile.tools.bench.serving_quality import ROWS, LastRows
from tsa_compile.tools.bench.serving_requests import answer

BLOCK_SPARSE = {"policy": "BlockSparse", "alpha": 0.9, "window": 64, "last_dense": 0, "min_context": 0}


@pytest.mark.parametrize("chunk", [1024, 192])
def test_last_rows_are_those_of_the_model(model, chunk):
    from transformers import LlamaForCausalLM

    (prompt,) = (x["prompt_token_ids"] for x in prompts([1000]))
    with engine(model, custom=False, max_num_batched_tokens=1024) as llm, steps_of(llm, chunk), LastRows(llm, 1000) as rows:
        answer(llm, [prompt], 4)
        found = rows.logits()
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(model)(torch.tensor([prompt])).logits[0, -ROWS:]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_task_has_its_alpha_and_what_it_reads(model):
    (prompt,) = (x["prompt_token_ids"] for x in prompts([1500]))
    with engine(model, BLOCK_SPARSE) as llm:
        before, _ = read_share(lambda: answer(llm, [prompt], 1))
        with with_alpha(llm, 0.0):
            assert read_share(lambda: answer(llm, [prompt], 1))[0] == 1.0
        assert read_share(lambda: answer(llm, [prompt], 1))[0] == before < 1.0
        found = alpha(llm, 1500, 0.8)
        assert found["pairs"] == pytest.approx(0.8, rel=0.1)


def test_random_weights_make_uneven_attention(model, tmp_path):
    from pathlib import Path

    (tmp_path / "config.json").write_text((Path(model) / "config.json").read_text())
    seen = {}
    with new_weights(), engine(str(tmp_path), custom=False, load_format="dummy") as llm:
        llm.apply_model(lambda m: seen.update(m.named_parameters()))
        answers = answer(llm, [x["prompt_token_ids"] for x in prompts([200])], 8, logprobs=1)
    assert seen["model.norm.weight"].unique().tolist() == [1.0]
    embedding = seen["model.embed_tokens.weight"]
    assert float(embedding.std()) == pytest.approx(embedding.shape[1] ** -0.5, rel=0.02)
    ((first, *_),) = (x.outputs[0].logprobs for x in answers)
    assert max(x.logprob for x in first.values()) > -torch.tensor(512.0).log() + 1  # one word is likelier than the others
