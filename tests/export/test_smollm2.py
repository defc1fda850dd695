"""A real model, SmolLM2-135M-Instruct, exported and run on ONNX Runtime's CPU provider."""

import pytest
import torch
from torch import nn

ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="extra 'onnx' is not installed")
pytest.importorskip("transformers", reason="extra 'hf' is not installed")
pytest.importorskip("gguf", reason="extra 'demo' is not installed")


import tsa_compile as tsa  # noqa: E402
from tsa_compile import export  # noqa: E402
from tsa_compile.export import native  # noqa: E402
from tsa_compile.export.onnx_model.run_onnx import make_session  # noqa: E402
from tsa_compile.tools.bench.prompts import chat_ids, needle_prompt  # noqa: E402
from tsa_compile.tools.load_models import load_packaged  # noqa: E402

DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
POLICY = tsa.TokenSparse(coverage=0.05, window=32, min_tokens=96, completion=tsa.Completion(64, 4, 64))


class LastLogits(nn.Module):
    """Logits of the last position: what greedy generation needs of a prefill."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_packaged("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_four_layers_at_unseen_lengths_and_batches(smollm2, tmp_path):
    model = smollm2[0]
    kept, model.model.layers = model.model.layers, model.model.layers[:4]
    try:
        short, path = LastLogits(model), tmp_path / "smollm2.onnx"
        ids = torch.randint(0, model.config.vocab_size, (2, 150))
        made = export.onnx(short, (ids,), path, policy=POLICY, dynamic_shapes=(DYNAMIC,))
        assert len(made.nodes) == 4
        for batch, length in [(1, 33), (2, 260), (1, 700)]:
            other = torch.randint(0, model.config.vocab_size, (batch, length))
            assert export.check(path, short, (other,), atol=1e-4).worst < 1e-4
    finally:
        model.model.layers = kept


def greedy(step, ids, count):
    """`count` tokens, each from a forward over everything so far."""
    for _ in range(count):
        ids = torch.cat([ids, step(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, -count:]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["custom", "portable"])
def test_the_whole_model_answers_as_pytorch_does(smollm2, tmp_path, form):
    model, tokenizer = smollm2
    prompt = needle_prompt(250, depth=0.4)
    ids = chat_ids(tokenizer, prompt)
    whole, path = LastLogits(model), tmp_path / "smollm2.onnx"
    example = torch.randint(0, model.config.vocab_size, (2, 150))
    with torch.no_grad():
        program = torch.export.export(whole, (example,), dynamic_shapes=(DYNAMIC,), strict=False)
        assert len(export.onnx(program, (example,), path, policy=POLICY, form=form).nodes) == 30
        expected = greedy(export.program(program, (example,), policy=POLICY).module(), ids, 6)
    session = make_session(path, library=native.build_library() if form == "custom" else None)
    actual = greedy(lambda x: torch.from_numpy(session.run(None, {"input_ids": x.numpy()})[0]), ids, 6)
    assert torch.equal(actual, expected)
    assert prompt.answer in tokenizer.decode(actual)
