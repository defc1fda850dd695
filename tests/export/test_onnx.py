"""Models through torch.export, the passes and torch.onnx, run on ONNX Runtime's CPU provider."""

import json
import logging

import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="extra 'onnx' is not installed")
transformers = pytest.importorskip("transformers", reason="extra 'hf' is not installed")

import tsa_compile as tsa  # noqa: E402
from tsa_compile import export  # noqa: E402
from tsa_compile.export import native  # noqa: E402
from tsa_compile.export.onnx_model.run_onnx import make_session  # noqa: E402

logging.getLogger("torch.onnx").setLevel(logging.ERROR)
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
PAPER = tsa.TokenSparse.paper(coverage=0.3, window=16, min_tokens=32)
COMPLETED = tsa.TokenSparse(coverage=0.3, window=16, min_tokens=32, completion=tsa.Completion(24, 4, 20))
UNSEEN = [(1, 7), (2, 64), (3, 300)]  # batch, length


class Logits(nn.Module):
    """A causal language model without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def llama(layers=1, **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, num_hidden_layers=layers, **{**sizes, **changes})
    return Logits(transformers.LlamaForCausalLM(config).eval())


def ids(batch, length):
    return torch.randint(0, 128, (batch, length))


def padded(batch, length):
    """Token ids and an attention mask with left padding in the first row."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return ids(batch, length), mask


def opset_of(path):
    return [i.version for i in onnx.load(path).opset_import if i.domain == ""]


@pytest.mark.parametrize(
    ("inputs", "policy"),
    [
        pytest.param(ids, PAPER, id="plain-paper"),
        pytest.param(padded, COMPLETED, id="padded-completed"),
        pytest.param(ids, COMPLETED, id="plain-completed", marks=pytest.mark.slow),
        pytest.param(padded, PAPER, id="padded-paper", marks=pytest.mark.slow),
    ],
)
def test_llama_equals_pytorch_at_unseen_sizes(tmp_path, policy, inputs):
    model, path = llama(), tmp_path / "llama.onnx"
    args = inputs(2, 100)
    args = args if isinstance(args, tuple) else (args,)
    made = export.onnx(model, args, path, policy=policy, dynamic_shapes=(DYNAMIC,) * len(args))
    assert made.nodes == ("model.model.layers.0.self_attn.token_sparse_attention",)
    assert opset_of(path) == [21]
    for batch, length in UNSEEN:
        other = inputs(batch, length)
        assert export.check(path, model, other if isinstance(other, tuple) else (other,), atol=1e-5).worst < 1e-5


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4))


def qwen3():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=128, **sizes, **heads))


@pytest.mark.parametrize("make", [gpt2, qwen3])
def test_other_architectures(tmp_path, make):
    model, path = Logits(make().eval()), tmp_path / "m.onnx"
    assert len(export.onnx(model, (ids(2, 100),), path, policy=PAPER, dynamic_shapes=(DYNAMIC,)).nodes) == 1
    assert export.check(path, model, (ids(2, 150),), atol=1e-5).worst < 1e-5


def test_a_plan_mixes_dense_and_both_forms(tmp_path):
    plan = tsa.Plan(PAPER, rules=[(0, "prefill", tsa.Dense()), (2, "prefill", COMPLETED)], notes={"made by": "this test"})
    model, path = llama(layers=3), tmp_path / "m.onnx"
    made = export.onnx(model, (ids(2, 100),), path, policy=plan, dynamic_shapes=(DYNAMIC,))
    assert made.plan == plan
    proto = onnx.load(path)
    assert [n.overload for n in proto.graph.node if n.domain == "ai.tsa"] == ["", "completed"]
    assert sorted(f.overload for f in proto.functions) == ["", "completed"]
    notes = {p.key: p.value for p in proto.metadata_props}
    assert tsa.Plan.from_dict(json.loads(notes["tsa_compile.plan"])) == plan
    assert notes["tsa_compile.version"] == tsa.__version__
    assert notes["tsa_compile.form"] == "portable"
    sites = json.loads(notes["tsa_compile.sites"])
    assert [s["kept dense because"] for s in sites] == ["policy is Dense", None, None]
    assert export.check(path, model, (ids(1, 200),), atol=1e-5).worst < 1e-5


def test_another_opset(tmp_path):
    model, path = llama(), tmp_path / "m.onnx"
    export.onnx(model, (ids(2, 100),), path, policy=PAPER, dynamic_shapes=(DYNAMIC,), opset=23)
    assert opset_of(path) == [23]
    assert export.check(path, model, (ids(3, 120),), atol=1e-5).worst < 1e-5


def test_the_custom_form_runs_on_the_native_library(tmp_path):
    model, path = llama(), tmp_path / "m.onnx"
    export.onnx(model, (ids(2, 100),), path, policy=COMPLETED, form="custom", dynamic_shapes=(DYNAMIC,))
    assert not onnx.load(path).functions
    with pytest.raises(export.ExportError, match=r"layers\.0\.self_attn.*no portable body"):
        export.check(path, model, (ids(1, 9),))
    library = native.build_library()
    for batch, length in UNSEEN:
        assert export.check(path, model, (ids(batch, length),), library=library, atol=1e-5).worst < 1e-5


def test_an_exported_program_is_taken_as_it_is(tmp_path):
    model, args = llama(), (ids(2, 100),)
    with torch.no_grad():
        program = torch.export.export(model, args, dynamic_shapes=(DYNAMIC,), strict=False)
    export.onnx(program, args, tmp_path / "m.onnx", policy=PAPER)
    assert export.check(tmp_path / "m.onnx", model, (ids(2, 140),), atol=1e-5).worst < 1e-5


def test_a_fixed_length_is_a_capacity_that_is_checked(tmp_path):
    """Without dynamic sizes the graph has one length; rank, dtype and length of the inputs are refused by name."""
    model, path = llama(), tmp_path / "m.onnx"
    export.onnx(model, (ids(1, 80),), path, policy=PAPER)
    runner = make_session(path)
    runner.run(None, {"input_ids": ids(1, 80).numpy()})
    for message, x in [("index: 1 Got: 81 Expected: 80", ids(1, 81)), ("Invalid rank for input: input_ids", ids(1, 80)[0])]:
        with pytest.raises(Exception, match=message):
            runner.run(None, {"input_ids": x.numpy()})
    with pytest.raises(Exception, match="Unexpected input data type"):
        runner.run(None, {"input_ids": ids(1, 80).int().numpy()})


class Decode(nn.Module):
    """One decode step of a language model: past keys and values in, present ones out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, *past):
        cache = transformers.DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return out.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values))


def test_the_decode_graph_stays_dense(tmp_path):
    model, path = Decode(llama().model), tmp_path / "m.onnx"
    past = tuple(torch.randn(2, 2, 70, 16) for _ in range(2))
    args = (ids(2, 1), *past)
    shapes = ({0: DYNAMIC[0]}, tuple({0: DYNAMIC[0], 2: DYNAMIC[0]} for _ in past))
    with pytest.raises(export.ExportError, match="no attention site was replaced"):
        export.onnx(model, args, path, policy=PAPER, dynamic_shapes=shapes)
    made = export.onnx(model, args, path, policy=PAPER, dynamic_shapes=shapes, require_sites=False)
    assert made.nodes == ()
    other = (ids(3, 1), *(torch.randn(3, 2, 200, 16) for _ in range(2)))
    result = export.check(path, model, other, atol=1e-5)
    assert len(result.differences) == 3


def test_a_transformed_model_exports_with_its_policy_said_again(tmp_path):
    model = tsa.transform(llama(), PAPER)
    with pytest.raises(ValueError, match="pass the policy or plan again"):
        export.onnx(model, (ids(1, 80),), tmp_path / "m.onnx")
    export.onnx(model, (ids(1, 80),), tmp_path / "m.onnx", policy=PAPER)
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": tsa.Dense()}, export.ExportError, "no attention site was replaced .*policy is Dense"),
        ({"form": "fast"}, ValueError, "form must be one of"),
        ({"target": "openvino"}, ValueError, "target must be one of"),
        ({"form": "custom", "target": "tensorrt"}, ValueError, "TensorRT takes the portable form"),
        ({"opset": 20}, ValueError, r"opset must be in 21\.\.24, got 20"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export.onnx(llama(), (ids(1, 80),), tmp_path / "m.onnx", **{"policy": PAPER, **options})
    assert not (tmp_path / "m.onnx").exists()


def test_float64_is_refused_by_name(tmp_path):
    with pytest.raises(export.ExportError, match=r"token_sparse_attention\w*: q is torch\.float64"):
        export.onnx(llama().double(), (ids(1, 80),), tmp_path / "m.onnx", policy=PAPER)


def test_check_finds_other_weights_and_foreign_files(tmp_path):
    model, path = llama(), tmp_path / "m.onnx"
    export.onnx(model, (ids(1, 80),), path, policy=PAPER)
    with torch.no_grad():
        model.model.lm_head.weight += 0.1
    with pytest.raises(export.ExportError, match="outputs differ by up to"):
        export.check(path, model, (ids(1, 80),))
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    with pytest.raises(export.ExportError, match="not an export of tsa_compile"):
        export.check(path, model, (ids(1, 80),))
