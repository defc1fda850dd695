"""The comparison of decode policies on a random model: what cells measure, resuming, the time limit, and the reports."""

from __future__ import annotations

import dataclasses
import html.parser
import json

import pytest
import torch
from rich.console import Console

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tests.frontends.test_cli import in_process
from tests.tools.evaluate.tiny_lm import byte_tokenizer
from tsa_compile.tools.evaluate import decode_job, decode_pages, prompter, setting
from tsa_compile.tools.evaluate.decode_cells import TextCell
from tsa_compile.tools.evaluate.decode_job import DecodeOptions, run
from tsa_compile.tools.evaluate.decode_runner import DENSE_PLAN, DecodeRunner
from tsa_compile.tools.evaluate.decode_summary import decode_rows
from tsa_compile.tools.evaluate.decode_tasks import TaskCell, own_prompts
from tsa_compile.tools.evaluate.ruler_cell import answer_text

OPTIONS = DecodeOptions(
    "tiny", (1024,), samples=1, tasks=("text", "steps", "needle"), families=("pages",), keep=(0.25, 1.0), last=3, batches=(1,)
)  # of one batch size and one capacity, so that a kind of policy is traced once


@pytest.fixture(scope="module")
def runner():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return DecodeRunner(tiny_llama(num_hidden_layers=2, vocab_size=258, hidden_size=32, max_position_embeddings=4096))


@pytest.fixture(autouse=True)
def _quick(runner, monkeypatch):
    monkeypatch.setattr(decode_job, "DecodeRunner", lambda model: runner)
    for module in (prompter, setting):
        monkeypatch.setattr(module, "reference_text", lambda: " ".join(map(str, range(2000))))  # the real one takes seconds


@pytest.fixture
def evaluated(runner, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "decode"  # of all tests here: measured once
    folder.mkdir(exist_ok=True)
    tsa.Plan(decode=tsa.PageSparse(pages=4)).save(folder / "four.json")
    options = dataclasses.replace(OPTIONS, policies=(str(folder / "four.json"),))
    return run(options, runner.model, byte_tokenizer(False), folder, Console(quiet=True)), options, folder


def test_every_key_costs_nothing_and_fewer_cost_something(evaluated):
    rows = {r.variant: r for r in decode_rows(evaluated[0])}
    dense, every, some, four = (rows[name] for name in ("dense", "pages 1", "pages 0.25", "four"))
    assert max(dense.kl) < 1e-6
    assert max(every.kl) < 1e-6
    assert 1e-6 < some.kl[-1] < four.kl[-1]
    assert dense.top1 == dense.accepted == 1.0
    assert all(len(r.kl) == 3 and set(r.ms) == {1} for r in rows.values())
    assert dense.tasks["own tasks"].difference == 0.0


def test_bytes_are_those_of_the_formula(evaluated):
    rows = {r.variant: r for r in decode_rows(evaluated[0])}
    layers, kv_heads, dim, size = 2, 2, 8, 4
    lengths = [1024 - 3 + n for n in (1, 2)]  # of the steps that are counted
    row = kv_heads * dim * size
    assert rows["dense"].bytes_read == pytest.approx(layers * 2 * row * sum(lengths) / 2)
    assert rows["dense"].share == 1.0
    kept = [3 * 16 + n % 16 for n in lengths]  # three whole pages and the one that is not full
    index = [n // 16 * (row + 4) for n in lengths]
    assert rows["four"].read["keys"] + rows["four"].read["values"] == pytest.approx(layers * 2 * row * sum(kept) / 2)
    assert rows["four"].read["index"] == pytest.approx(layers * sum(index) / 2)


def test_a_second_call_measures_nothing_and_a_limit_stops(evaluated, runner, monkeypatch, tmp_path, capsys):
    data, options, folder = evaluated
    monkeypatch.setattr(TextCell, "__init__", lambda *args: pytest.fail("measured again"))
    again = run(options, runner.model, byte_tokenizer(False), folder, Console(quiet=True))
    assert len(again["cells"]) == len(data["cells"]) == 4 * 3
    monkeypatch.setattr(decode_job, "_cell", lambda *args: pytest.fail("begun after the limit"))
    limited = dataclasses.replace(OPTIONS, minutes=0.0)
    assert run(limited, runner.model, byte_tokenizer(False), tmp_path, Console())["cells"] == []
    assert "0 minutes are over" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another evaluation"):
        run(dataclasses.replace(OPTIONS, last=4), runner.model, byte_tokenizer(False), folder, Console(quiet=True))


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value) for name, value in attrs if name != "xmlns"]


def test_the_page_has_all_policies_and_loads_nothing(evaluated):
    data = json.loads((evaluated[2] / "results.json").read_text())
    text, page = decode_pages.page(data), Page()
    page.feed(text)
    assert page.tags.count("svg") == 7  # KL twice, acceptance, tasks, a batch, quantiles, bytes
    assert page.tags.count("tr") == (1 + 4) + (1 + 4)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not any("://" in (value or "") for _, value in page.attributes)
    table = decode_pages.markdown(data)
    assert all(f"| {name} |" in table for name in ("dense", "pages 0.25", "pages 1", "four"))


def test_answers_are_those_of_generate(runner, tmp_path):
    writer = prompter.Prompter(byte_tokenizer(False))
    (made,) = own_prompts("multi_key", writer, 1024, 1)
    cell = TaskCell("multi_key", tmp_path, runner, writer, 1024, 1, 1)
    ids = torch.tensor([made.ids])
    out = runner.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=made.new, do_sample=False)
    assert cell.measure(DENSE_PLAN)["answers"] == [answer_text(writer, out[0, ids.shape[1] :].tolist())]


def test_a_plan_that_leaves_an_attention_dense_is_an_error(runner):
    request = runner.prefill(torch.randint(2, 250, (1, 1020)), 2)
    runner.use(tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact(), rules=[(1, "decode", tsa.Dense())]))
    with pytest.raises(RuntimeError, match="1 attentions ran under the plan, not 2"), runner.counted(request):
        runner.step(torch.tensor([[3]]), request)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--decode", "--tasks", "inside"), "error: unknown task 'inside' of decode"),
        (("--decode", "--families", "paper"), "error: unknown family 'paper' of decode"),
        (("--decode", "--coverages", "0.1"), "error: --coverages is an option without --decode"),
        (("--minutes", "3"), "error: --minutes is an option with --decode"),
        (("--decode", "--lengths", "100"), "error: lengths must be 256 tokens or more"),
    ],
)
def test_a_wrong_argument_is_one_line(args, message, tmp_path):
    done = in_process("eval", "smollm2", "--out", str(tmp_path), *args)
    assert done.returncode == 1
    assert message in done.stderr
