"""`tsa-compile export`: what it writes, and that a request it cannot honour is named before any work."""

import dataclasses

import pytest
import torch
from rich.console import Console

ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="extra 'onnx' is not installed")
pytest.importorskip("transformers", reason="extra 'hf' is not installed")

import tsa_compile as tsa  # noqa: E402
from tests.api.tiny import tiny_llama, token_ids  # noqa: E402
from tsa_compile.export.common import ExportError  # noqa: E402
from tsa_compile.export.export_cli import Request, export_file, export_model  # noqa: E402
from tsa_compile.plan import as_plan  # noqa: E402

PLAN = as_plan(tsa.TokenSparse(coverage=0.3, window=16, min_tokens=32, completion=tsa.Completion(24, 4, 20)))


def session(path, library=None):
    options = ort.SessionOptions()
    if library:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_prefill_and_decode_serve_a_prompt_without_pytorch(tmp_path):
    """Both graphs, both forms: greedy tokens on ONNX Runtime equal the rewritten model's."""
    model, console = tiny_llama(), Console(quiet=True)
    request = Request("onnx", tmp_path / "prefill.onnx", PLAN, tokens=70)
    assert export_model(model, request, console) == [request.out]
    custom = dataclasses.replace(request, out=tmp_path / "custom.onnx", form="custom", native=True)
    files = export_model(model, custom, console)
    assert [f.name for f in files] == ["custom.onnx", "libtsa_ort.so"]
    decode = dataclasses.replace(request, out=tmp_path / "decode.onnx", graph="decode")
    export_model(model, decode, console)
    prompt = token_ids(150, batch=2)
    expected = tsa.transform(model, PLAN).generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, -5:]
    for prefill in (session(request.out), session(*files)):
        logits, *cache = prefill.run(None, {"input_ids": prompt.numpy()})
        step, made = session(decode.out), []
        for _ in range(5):
            made.append(torch.from_numpy(logits[:, -1].argmax(-1))[:, None])
            names = [i.name for i in step.get_inputs()]
            logits, *cache = step.run(None, dict(zip(names, [made[-1].numpy(), *cache], strict=True)))
        assert torch.equal(torch.cat(made, 1), expected)


def test_native_for_a_file_that_is_there(tmp_path):
    request = Request("onnx", tmp_path / "m.onnx", PLAN, tokens=40, check=False)
    export_model(tiny_llama(), request, Console(quiet=True))
    (library,) = export_file(request.out, dataclasses.replace(request, native=True), Console(quiet=True))
    assert session(request.out, library).get_inputs()[0].name == "input_ids"
    with pytest.raises(ValueError, match="is an ONNX file already"):
        export_file(request.out, request, Console(quiet=True))


def test_without_a_compiler_native_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    request = Request("onnx", tmp_path / "m.onnx", PLAN, native=True)
    with pytest.raises(ExportError, match=r"needs a C\+\+17 compiler: none of no-such-compiler"):
        export_file(tmp_path / "m.onnx", request, Console(quiet=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": "openvino"}, "--to must be one of onnx, tensorrt, aoti"),
        ({"to": "aoti"}, r"--out must end in \.pt2 for --to aoti"),
        ({"to": "aoti", "out": "m.pt2", "native": True}, "--native and --form custom are for --to onnx"),
        ({"to": "tensorrt", "out": "m.engine", "graph": "decode"}, "--graph decode is for --to onnx"),
        ({"cuda": True}, "pass --native"),
        ({"capabilities": ("sm90",)}, r"a compute capability is written like 8\.6, got 'sm90'"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met(tmp_path, change, message):
    settings = {"to": "onnx", "out": "m.onnx", "plan": PLAN, **change}
    with pytest.raises(ValueError, match=message):
        Request(**{**settings, "out": tmp_path / settings["out"]})
