"""The table of page indexes on a random model: what is read and left out against plain formulas, and a job that goes on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.tools.evaluate.tiny_lm import byte_tokenizer, tiny_lm
from tsa_compile.tools.evaluate import emulate_texts, page_indexes
from tsa_compile.tools.evaluate.emulate import Job
from tsa_compile.tools.evaluate.emulate_decode import DecodeText
from tsa_compile.tools.evaluate.emulate_model import Emulator, Layer
from tsa_compile.tools.evaluate.emulate_outcome import Choice, best_pages, exact_output, mean_masses, outcome, page_masses
from tsa_compile.tools.evaluate.emulate_pages import Index, build, log_masses
from tsa_compile.tools.evaluate.emulate_reuse import _pair, overlap
from tsa_compile.tools.evaluate.emulate_select import DecodeRule, Pages, masses, shares, top
from tsa_compile.tools.evaluate.index_table import tables

LENGTH, ROWS = 256, 20
PAGES = Pages.of(DecodeRule(), LENGTH, ROWS, torch.device("cpu"))


def layer() -> Layer:
    torch.manual_seed(3)
    q, k, v = torch.randn(4, ROWS, 8), torch.randn(2, LENGTH, 8), torch.randn(2, LENGTH, 8)
    return Layer(0, q, k, v, 8**-0.5, None, None, torch.randn(32, 32))


def test_the_output_is_a_softmax_over_the_chosen_pages():
    one = layer()
    chosen = (torch.rand(2, ROWS, LENGTH // 16) < 0.4) & PAGES.visible | PAGES.forced
    out, seen = outcome(one, Choice(chosen, PAGES))
    k, v = (x.double().repeat_interleave(2, 0) for x in (one.k, one.v))
    logits = one.q.double() @ k.mT * one.scale
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[-ROWS:]
    read = chosen.repeat_interleave(16, 2).repeat_interleave(2, 0) & causal
    expected = logits.masked_fill(~read, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    true = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    torch.testing.assert_close(seen.mass.double(), (true * read).sum(-1).unflatten(0, (2, 2)).mean((1, 2)), atol=1e-5, rtol=1e-5)


def test_pages_of_equal_keys_are_completed_exactly():
    one = layer()
    k = one.k.unflatten(1, (-1, 16))[:, :, :1].expand(-1, -1, 16, -1).flatten(1, 2)
    one = dataclasses.replace(one, k=k)
    rest = torch.stack([mean_masses(one, g) for g in range(2)])
    out, _ = outcome(one, Choice(PAGES.forced.expand(2, -1, -1), PAGES, rest))
    torch.testing.assert_close(out, exact_output(one), atol=1e-5, rtol=1e-5)


def test_a_first_stage_refines_the_best_pages_alone():
    one = layer()
    index = Index("exact", first=0.5)
    k = one.k[:1]
    exact, means = ({n: x[0] for n, x in build(Index(kind), k, None, None).items()} for kind in ("exact", "mean"))
    q = one.q[:2]
    found = masses(index, exact, means, q, one.scale, PAGES, index.first)
    own = log_masses(Index("exact"), exact, q, one.scale)
    coarse = log_masses(Index("mean"), means, q, one.scale)
    passed = top(shares(coarse, PAGES), PAGES, 0.5)
    assert 0 < int(passed.sum()) < passed.numel()
    assert torch.equal(found, torch.where(passed, own, coarse))


def test_a_list_of_another_layer_against_its_own():
    one = layer()
    mass = torch.stack([page_masses(one, g) for g in range(2)])
    count = (0.4 * PAGES.count).ceil()
    own = torch.stack([best_pages(m, PAGES, count) for m in mass])
    found, held = _pair(own, own, mass, PAGES)
    assert found.tolist() == [1.0, 1.0]
    torch.testing.assert_close(held, torch.ones(2))
    swapped = _pair(own.flip(0), own, mass, PAGES)
    assert torch.equal(swapped[0], found)  # each head finds its own
    nothing = _pair(torch.zeros_like(own), own, mass, PAGES)
    assert nothing[0].tolist() == [0.0, 0.0]
    always = (mass * PAGES.forced).sum(-1)
    torch.testing.assert_close(nothing[1], (always / ((mass * own).sum(-1) + always)).mean(1))


def test_keys_as_the_cache_keeps_them():
    k = torch.randn(1, 640, 4) @ torch.randn(4, 32)
    kept = build(Index("kept_basis"), k, None, None)["keys"]
    assert float((kept - k).norm() / k.norm()) < 0.02
    pages = k.unflatten(1, (-1, 16))
    torch.testing.assert_close(kept.unflatten(1, (-1, 16)).mean(2), pages.mean(2), atol=0.1, rtol=0.1)


def test_bytes_of_a_key():
    two = {"kind": "basis", "bits": 4, "first": 0.2}
    assert DecodeRule(Index("mean")).bytes_per_key(128) == 16
    assert DecodeRule(Index("mean"), completion="mean").bytes_per_key(128) == 32
    assert DecodeRule(Index("exact"), completion="mean").bytes_per_key(128) == 256 + 32
    assert math.isclose(DecodeRule(Index(**two)).bytes_per_key(128), 16 + 0.2 * (512 + 128 + 18) / 16)
    assert math.isclose(DecodeRule(Index(**two), anchors=4).bytes_per_key(128), 4 + 0.05 * (512 + 128 + 18) / 16)
    assert DecodeRule(Index("kept_basis")).bytes_per_key(128) == 57
    assert math.isclose(DecodeRule(Index("kept_basis", first=0.2)).bytes_per_key(128), 16 + 0.2 * 41)
    with pytest.raises(ValueError, match="completion"):
        DecodeRule(completion="yes")
    with pytest.raises(ValueError, match="anchors"):
        DecodeRule(completion="mean", anchors=2)


def texts_of(words, monkeypatch, number=2):
    monkeypatch.setattr(emulate_texts, "reference_text", lambda: words * 500)
    monkeypatch.setattr(emulate_texts, "library_code", lambda: (words[::-1] + "\n") * 500)
    return emulate_texts.standard_texts(byte_tokenizer(False), 512, number)


def test_pieces_of_text_are_cut_to_length(monkeypatch):
    texts = texts_of("the quick brown fox ", monkeypatch, 4)
    assert list(texts) == ["prose 0", "prose 1", "code 0", "code 1"]
    assert {t.shape for t in texts.values()} == {(512,)}
    with pytest.raises(ValueError, match="prose for 3 pieces of 512 tokens, 5 were asked for"):
        texts_of("the quick brown fox ", monkeypatch, 10)


def test_the_table_is_filled_and_goes_on(tmp_path, monkeypatch):
    torch.manual_seed(0)
    emulator = Emulator(tiny_lm().eval())
    texts = texts_of("the quick brown fox ", monkeypatch)
    text = DecodeText(emulator, texts["prose 0"])
    lists = text.run(DecodeRule(Index("mean"), anchors=4), 0.4)
    assert lists["kept"] == pytest.approx(text.run(DecodeRule(Index("mean")), 0.4)["kept"])
    assert set(overlap(text, 0.4, (1, 3, 9))) == {1, 3}
    monkeypatch.setattr(page_indexes, "KINDS", page_indexes.KINDS[::6])
    job = Job(emulator, texts, tmp_path / "out.jsonl")
    assert not page_indexes.fill(job, [0.4], 0.0)
    assert not job.rows
    assert page_indexes.fill(job, [0.4], 600.0)
    names = [name for name, _, _ in page_indexes.KINDS]
    shown = tables(job.rows, names, page_indexes.REUSE)
    assert len(job.rows) == 2 * (len(names) + 1)
    assert all(f"| {name} | 2 |" in shown for name in names)
    again = Job(emulator, texts, tmp_path / "out.jsonl")
    monkeypatch.setattr(Job, "decoded", lambda *a: pytest.fail("measured again"))
    assert page_indexes.fill(again, [0.4], 600.0)
    assert tables(again.rows, names, page_indexes.REUSE) == shown
