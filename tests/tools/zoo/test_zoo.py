"""The zoo: real models, what of them is replaced, and that the checks themselves can fail."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tsa_compile.tools.zoo import all_entries, jobs, support_table
from tsa_compile.tools.zoo.check_model import difference, run_scenario
from tsa_compile.tools.zoo.entries import Entry
from tsa_compile.tools.zoo.result import Result
from tsa_compile.tools.zoo.scenarios import SCENARIOS
from tsa_compile.tools.zoo.sdpa_reference import causal_with_padding

QUICK = {  # (model, implementation) -> scenarios; `tsa-compile zoo` runs all
    ("Qwen3", "sdpa"): ("chunked prefill", "left padding"),
    ("Gemma 3", "eager"): ("prefill, static cache", "packed sequences"),
    ("Gemma 2", "eager"): ("right padding",),
    ("GPT-2", "eager"): ("prefill, dynamic cache",),
    ("DeepSeek-V3", "sdpa"): ("prefill, static cache",),
    ("MPT", "eager"): ("prefill, static cache",),
    ("gpt-oss", "eager"): ("prefill, static cache",),
    ("BART", "sdpa"): ("call",),
    ("BERT", "eager"): ("left padding",),
    ("ViT", "sdpa"): ("call",),
    ("nanoGPT-style", "computed mask"): ("prefill",),
    ("nn.MultiheadAttention (causal)", "no fast path"): ("call",),
    ("nn.TransformerEncoder (causal, fused)", "fast path"): ("call",),
}


def entry_named(name: str) -> Entry:
    return next(e for e in all_entries.ENTRIES if e.name == name)


@pytest.mark.parametrize(("name", "implementation"), QUICK)
def test_a_part_of_the_zoo(name, implementation):
    entry = entry_named(name)
    pytest.importorskip(entry.library)
    wanted = QUICK[name, implementation]
    scenarios = [s for s in SCENARIOS[entry.kind] if s.name in wanted]
    assert len(scenarios) == len(wanted)
    for scenario in scenarios:
        result = run_scenario(entry, implementation, scenario)
        assert result.status == "ok", result


class Attention(nn.Module):
    """Causal attention of one layer on embeddings of the ids."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.embed, self.seen = form, nn.Embedding(96, 64), 0

    def forward(self, input_ids):
        x = self.embed(input_ids).unflatten(-1, (4, 16)).transpose(1, 2)
        if self.form == "none":
            return x.softmax(-1)
        if self.form == "breaks" and torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def made(form: str, **fields) -> Entry:
    return dataclasses.replace(entry_named("nanoGPT-style"), build=lambda i: Attention(form).eval(), causal=1, **fields)


@pytest.mark.parametrize(
    ("entry", "detail"),
    [
        (made("sdpa"), None),
        (made("breaks"), None),  # the model's own graph break
        (dataclasses.replace(made("sdpa"), causal=0), "2 of 2 sites replaced, expected 0"),
        (made("none"), "no attention found, and no warning"),
    ],
)
def test_the_check_tells_right_from_wrong(entry, detail):
    result = run_scenario(entry, "sdpa", SCENARIOS["plain"][0])
    assert result.status == ("ok" if detail is None else "failed"), result
    assert (detail or "") in result.detail


def test_the_check_sees_a_wrong_kernel(monkeypatch):
    from tsa_compile.kernels import registry

    real = registry.resolve
    attend = real("attend.tokens.reference:sparse_attention_reference")
    wrong = lambda *a: attend(*a)._replace(out=attend(*a).out * 1.001)  # noqa: E731
    monkeypatch.setattr(registry, "resolve", lambda w: wrong if w.endswith(":sparse_attention_reference") else real(w))
    result = run_scenario(made("sdpa"), "sdpa", SCENARIOS["plain"][0])
    assert result.status == "failed"
    assert "at coverage 0" in result.detail


def test_the_check_sees_a_wrong_selection(monkeypatch):
    from tsa_compile.kernels import registry

    real = registry.resolve
    select = real("compose_reference:select_tokens_reference")
    wrong = lambda x, *rest: select(x._replace(q=x.q.flip(2)), *rest)  # noqa: E731
    monkeypatch.setattr(registry, "resolve", lambda w: wrong if w.endswith(":select_tokens_reference") else real(w))
    result = run_scenario(made("sdpa"), "sdpa", SCENARIOS["plain"][0])
    assert result.status == "failed"
    assert "differs from the reference" in result.detail


def test_causal_with_padding_reads_masks():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    assert causal_with_padding(mask[None]) == (5, None)
    used, key_mask = causal_with_padding(mask & real[:, None, :])
    assert used == 5
    assert torch.equal(key_mask, real)
    static = torch.cat([mask, torch.zeros(5, 3, dtype=torch.bool)], 1)
    assert causal_with_padding(static[None]) == (5, None)
    for wrong in (mask.T, mask.triu(-2)):
        with pytest.raises(ValueError, match="not causal with padding"):
            causal_with_padding(wrong[None])


def test_difference_is_infinite_where_nothing_compares():
    x = torch.ones(3)
    assert difference([x], [x + 0.5]) == pytest.approx(0.5 / 1.5)
    assert difference([x], [x[:2]]) == float("inf")
    assert difference([x * float("nan")], [x]) == float("inf")


def test_a_missing_library_is_a_row(monkeypatch):
    monkeypatch.setattr(jobs, "missing", lambda library: f"{library} is not installed")
    (result,) = jobs.run_job(jobs.jobs_of([entry_named("DiT")])[0])
    assert (result.status, result.detail) == ("not run", "diffusers is not installed")
    assert "| DiT | sdpa |  |  | diffusers is not installed | not run |" in support_table.markdown([({"torch": "1"}, [result])])
    here = dataclasses.replace(result, scenario="call", status="ok", detail="", sites=2)
    text = support_table.markdown([({"torch": "1"}, [result]), ({"torch": "2", "timm": "1"}, [here])])
    assert "not run" not in text  # another run had it
    assert "| DiT | sdpa | 2 | 0 |  | 1 of 1 |" in text
    assert "Run 2: torch 2." in text  # versions of what was run, no others


def test_the_table_shows_runs_side_by_side(tmp_path):
    ok = Result("M", "torch", "sdpa", "prefill", calls=2, sites=4, replaced=2, reasons={"softcap: x (tanh)": 2})
    bad = dataclasses.replace(ok, scenario="decode", status="failed", detail="a | b")
    support_table.write_json(str(tmp_path / "a.json"), [ok, bad])
    environment, read = support_table.read_json(str(tmp_path / "a.json"))
    assert read == [ok, bad]
    assert environment["torch"] == importlib.metadata.version("torch")
    text = support_table.markdown([(environment, read), (environment, [ok])])
    assert "| M | sdpa | 2 | 1 | softcap | 1 of 2 | 1 of 1 |" in text
    assert "- M, sdpa, decode: a \\| b" in text
    unread = "2 attention-like operation(s) not recognised, left as they are: a.0: flash_attn; a.1: flash_attn"
    flash = Result("M", "torch", "flash", "prefill", calls=1, warnings=[unread])
    assert "| M | flash | 0 | 0 | not recognised: flash_attn | 1 of 1 |" in support_table.markdown([(environment, [flash])])
    assert support_table.joined([(environment, [bad]), ({}, [ok]), (environment, [ok, bad])]) == [
        (environment, [bad, ok]),
        ({}, [ok]),
    ]
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by"):
        support_table.read_json(str(tmp_path / "b.json"))


def test_names_that_no_model_has():
    assert len({(e.library, e.name) for e in all_entries.ENTRIES}) == len(all_entries.ENTRIES)
    assert [e.name for e in all_entries.select_entries("gemma 3,bloom")] == ["Gemma 3", "BLOOM"]
    with pytest.raises(ValueError, match="no model of the zoo has 'nope'"):
        all_entries.select_entries("nope")
