"""Every example runs as its first lines say, and prints something."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.tiny import tiny_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_own_module(monkeypatch, capsys):
    assert "3 of 3 attention sites replaced" in run("own_module.py", monkeypatch, capsys)


def test_compile_backend(monkeypatch, capsys):
    assert "relative difference" in run("compile_backend.py", monkeypatch, capsys)


def test_boundary_copy(monkeypatch, capsys):
    """Fixed blocks stay at chance, to three standard errors, however long they train; the bridge solves the task."""
    out = run("boundary_copy.py", monkeypatch, capsys)
    fixed, bridged = (float(re.search(name + r": ([\d.]+)% right", out)[1]) for name in ("fixed blocks", "bridged"))
    chance = float(re.search(r"by chance up to ([\d.]+)%", out)[1])
    assert fixed <= chance < 15
    assert bridged > 99
    assert "token 16 cannot depend on token 15" in out


@pytest.mark.slow  # tests/generate/test_diffusion.py trains the same model
def test_block_diffusion(monkeypatch, capsys):
    out = run("block_diffusion.py", monkeypatch, capsys)
    assert "6 keys of 12: 100.0% right, 3 denoising calls" in out
    assert "no list left a token out in 0% of the blocks" in out


def test_export_onnx(monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    out = run("export_onnx.py", monkeypatch, capsys, str(tmp_path / "a.onnx"))
    assert (tmp_path / "a.onnx").is_file()
    assert "attention nodes" in out


def test_hugging_face(monkeypatch, capsys, tmp_path):
    """With a random model, and a tokenizer that reads bytes."""
    tiny_llama(vocab_size=300, max_position_embeddings=4096).save_pretrained(tmp_path)
    _save_byte_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("many words " * 120)
    out = run("hugging_face.py", monkeypatch, capsys, str(tmp_path), str(tmp_path / "text.txt"))
    assert "attention sites replaced" in out


@pytest.mark.slow  # tests/generate/test_speculative.py does the same
def test_speculative(monkeypatch, capsys, tmp_path):
    """With a random model, and a tokenizer that reads bytes."""
    tiny_llama(vocab_size=300).save_pretrained(tmp_path)
    _save_byte_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("many words " * 20)
    out = run("speculative.py", monkeypatch, capsys, str(tmp_path), str(tmp_path / "text.txt"))
    assert "the model's own tokens: True" in out
    assert "32 tokens; 6.20 tokens a verify" in out  # a text as short is read as a whole
    assert "1 of 1 attentions of draft steps by their policy" in out


def _save_byte_tokenizer(folder: Path, **special: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.slow  # two processes of torchrun; tests/api/test_routed_policy.py does the same in forked ones
def test_routed():
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", EXAMPLES / "routed.py"]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    for rank, held in ((0, 367), (1, 352)):
        exact = f"rank {rank} of 2, Exact: holds {held} of 719 rows, 20 of 20 tokens alike, prompt {{'spread over 2 ranks': 1}}"
        assert exact in done.stdout
        assert f"rank {rank} of 2, PageSparse: holds {held} of 719 rows" in done.stdout


@pytest.mark.slow  # tests/api/test_resident_policy.py does the same
def test_resident(monkeypatch, capsys):
    pytest.importorskip("transformers")
    out = run("resident.py", monkeypatch, capsys)
    assert "strict: 20 of 20 tokens alike" in out
    assert float(re.search(r"lost mass ([\d.]+)", out)[1]) > 0.1


@pytest.mark.slow  # tests/rl/test_trl.py does the same
def test_grpo_sparse(monkeypatch, capsys, tmp_path):
    """Three steps, with a random model, and a tokenizer that reads bytes."""
    pytest.importorskip("trl", reason="the extra `rl` is not installed")
    model = tiny_llama(num_hidden_layers=2, vocab_size=300, max_position_embeddings=4096, eos_token_id=1)
    model.save_pretrained(tmp_path / "model")
    _save_byte_tokenizer(tmp_path / "model", eos_token="A")
    sizes = ["--context", "700", "--steps", "3", "--prompts", "2", "--samples", "4", "--new", "8", "--micro", "8"]
    where = [str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--schedule", "8", "--dense-layers", "1", "--adapter"]
    out = run("grpo_sparse.py", monkeypatch, capsys, *where, *sizes, "--dense-seeds", "2", "--tests", "3")
    assert "dense 0.000 +- 0.000 (2 seeds)" in out  # what answers at random is never right
    assert "polyline" in (tmp_path / "out" / "grpo_sparse.html").read_text()
    sparse = json.loads((tmp_path / "out" / "sparse-0.json").read_text())
    assert len(sparse["rewards"]) == 3
    assert sparse["end"] == 0.0
    assert 0 < sparse["rollouts"][0]["acceptance"] < 1 - 1e-6
    assert json.loads((tmp_path / "out" / "dense-0.json").read_text())["rollouts"][0]["acceptance"] > 1 - 1e-4


def test_no_example_is_left_out():
    tested = {
        "resident.py",
        "routed.py",
        "own_module.py",
        "boundary_copy.py",
        "block_diffusion.py",
        "compile_backend.py",
        "export_onnx.py",
        "grpo_sparse.py",
        "hugging_face.py",
        "speculative.py",
    }
    assert {p.name for p in EXAMPLES.glob("*.py")} == tested
