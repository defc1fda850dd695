"""The command line: each command runs, and a failure is one line on stderr with exit code 1."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.tiny import tiny_llama

ROOT = Path(__file__).parents[2]


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tsa_compile", *args], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )


def in_process(*args: str) -> subprocess.CompletedProcess[str]:
    """`command` without a process of its own, which takes seconds to import everything."""
    from tsa_compile.frontends import cli

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["tsa-compile", *args])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=2).save_pretrained(path)
    return str(path)


def test_explain_prints_json(folder):
    done = in_process("explain", folder, "--tokens", "100", "--json")
    assert done.returncode == 0, done.stderr
    sites = json.loads(done.stdout)["sites"]
    assert [s["replaced"] for s in sites] == [True] * 2


def test_warm_says_what_was_compiled(folder):
    done = in_process("warm", folder, "--max-batch", "2", "--max-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert "0 kernels compiled or loaded, in 5 calls" in done.stdout
    assert "no GPU here" in done.stdout
    assert "warming up" in done.stderr


def test_errors_name_the_file_or_the_option(folder, tmp_path):
    for name, content in (("latin", "é".encode("latin-1")), ("empty", b" \n"), ("broken.json", b'{"policy": ')):
        (tmp_path / name).write_bytes(content)
    latin, empty, broken = (str(tmp_path / name) for name in ("latin", "empty", "broken.json"))
    out, no_json = str(tmp_path / "out"), f"{broken}: Expecting value"
    said = {
        ("compare", folder, "--text", latin): f"{latin} is not UTF-8",
        ("compare", folder, "--text", empty): f"{empty} is empty",
        ("compare", folder, "--plan", broken): no_json,
        ("explain", folder, "--plan", broken): no_json,
        ("warm", folder, "--plan", broken): no_json,
        ("reach", folder, "--plan", broken): no_json,
        ("calibrate", folder, "--prompts", empty, "--out", out): f"{empty} is empty",
        ("calibrate", folder, "--prompts", empty, "--out", out, "--coverages", "x"): "--coverages must be numbers",
        ("eval", folder, "--out", out, "--lengths", "abc"): "--lengths must be whole numbers, comma separated, got 'abc'",
    }
    for command_line, error in said.items():
        done = in_process(*command_line)
        assert done.returncode == 1
        assert f"error: {error}" in done.stderr


def test_explain_under_a_plan_in_a_narrow_terminal(folder, tmp_path, monkeypatch):
    """Modules are folded, not cut: layers can be told apart."""
    (tmp_path / "policy.json").write_text('{"policy": "TokenSparse"}')
    monkeypatch.setattr("tsa_compile.frontends.cli.console.width", 80)
    done = in_process("explain", folder, "--tokens", "100", "--plan", str(tmp_path / "policy.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TokenSparse") == 2
    assert "…" not in done.stdout
    done = in_process("explain", folder, "--tokens", "100", "--plan", str(tmp_path / "policy.json"), "--json")
    assert [s["reason"] for s in json.loads(done.stdout)["sites"]] == ["up to 1152 tokens are all kept"] * 2


def test_explain_prints_a_table(folder):
    """By a process in the checkout, whose folder `kernels` must not take the place of Hugging Face's package for transformers."""
    done = command("explain", folder, "--tokens", "100")
    assert done.returncode == 0, done.stderr
    assert "2 of 2 attention sites replaced" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("explain", "no/such/folder/here"), "error: "),
        (("explain", "smollm2", "--coverage", "7"), "error: TokenSparse.coverage must be a number in [0, 1), got 7.0"),
        (("explain", "smollm2", "--tokens", "3"), "Invalid value for '--tokens'"),
        (("frobnicate",), "No such command 'frobnicate'"),
    ],
)
def test_a_failure_is_one_line(args, message):
    done = in_process(*args)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


class Hidden:
    """An import finder for which some packages are not there."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, *_):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("args", "missing", "extra"),
    [
        (["demo"], "transformers", "demo"),
        (["explain", "smollm2"], "transformers", "hf"),
        (["explain", "smollm2"], "gguf", "demo"),
        (["export", "m.onnx", "-o", "m.engine", "--to", "tensorrt"], "tensorrt_rtx", "tensorrt"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path, args, missing, extra):
    from tsa_compile.frontends import cli

    hidden = (missing, f"{missing}_bindings")
    for name in [n for n in sys.modules if n.partition(".")[0] in hidden]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden(*hidden), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["tsa-compile", *args])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert re.search(rf"pip install ['\"]tsa-compile\[{extra}\]['\"]", said), said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_demo_finds_the_needle():
    done = command("demo", "--tokens", "2000", "--repeats", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": found") == 2
    assert "30 of 30 attention sites replaced" in done.stdout
    assert "decode  32 of 32 tokens equal; steps: 31 in one graph, on fixed buffers" in done.stdout
