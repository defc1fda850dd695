"""The experiment on remembered keys, of a size that says nothing: it trains, measures and writes what it should."""

from __future__ import annotations

import json

import pytest
import torch

from tsa_compile.tools.diffusion.experiment import Experiment, lines, prose, run
from tsa_compile.tools.diffusion.model import BlockLM, training_loss, training_mask
from tsa_compile.tools.diffusion.recall_task import RecallTask
from tsa_compile.tools.diffusion.train import Curriculum

TINY = Experiment(
    keys=4, values=4, questions=2, prefix=16, width=16, layers=2, heads=2, kv_heads=1, mlp=16, steps=60, batch=4,
    remembered=(1, 4), dense_layers=1, rows=8,
)  # fmt: skip


def test_it_writes_its_results(tmp_path):
    told = []
    found = run(TINY, tmp_path, "cpu", told=lambda step, prefix, loss: told.append((step, prefix)))
    assert told == [(50, 8)]  # not mastered within 60 steps
    data = json.loads((tmp_path / "results.json").read_text())
    assert set(data["results"]) == {"fixed", "adaptive"}
    assert set(data["results"]["fixed"]) == {"dense", "k 1", "k 4", "k 64, 5 queries"}
    fixed = found["fixed"]
    assert fixed["dense"].forwards == fixed["k 1"].forwards == 2
    assert 0 < fixed["k 1"].mass < fixed["k 4"].mass <= 1
    assert fixed["k 64, 5 queries"].never_bit == 1  # the prefix has 16 tokens
    assert lines(fixed)[0].startswith("dense")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<polyline") == 4
    again = BlockLM(TINY.sizes)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert data["parameters"] == sum(p.numel() for p in again.parameters())


def test_training_stops_in_time(tmp_path):
    told = []
    run(TINY, tmp_path, "cpu", seconds=0.0, told=lambda step, prefix, loss: told.append(step))
    assert told == []


def test_samples_have_their_facts_and_the_answers_to_the_questions():
    task = RecallTask(keys=6, values=5, questions=3, prefix=60, fillers=256)
    ids = task.sample(20, torch.Generator().manual_seed(0), prose(60))
    assert ids.shape == (20, 66)
    first = task.keys * task.values
    for row in ids.tolist():
        facts = {t // task.values: t % task.values for t in row[:60] if t < first}
        assert len(facts) == 6
        assert [facts[q - first] for q in row[60:63]] == [a - first - task.keys for a in row[63:]]
        assert all(0 <= t - task.first_filler < 256 for t in row[:60] if t >= first)
    noise = task.noise(500, torch.Generator().manual_seed(0))
    assert not noise[:, :3].any()
    assert noise[:, 3:].any(1).all()


def test_the_loss_of_the_answers_is_apart_from_that_of_prose():
    task = TINY.task
    model, ids = BlockLM(TINY.sizes), task.sample(2, torch.Generator().manual_seed(0))
    mask, noise = training_mask(20, 4), torch.zeros(2, 20, dtype=torch.bool)
    noise[:, 18:] = True
    answers, none = training_loss(model, ids, noise, mask)
    assert answers > 0
    assert none == 0
    noise[:, :16] = True
    both = training_loss(model, ids, noise, mask)
    noise[:, 18:] = False
    alone = training_loss(model, ids, noise, mask)
    assert alone.answers == 0
    torch.testing.assert_close(both.prose, alone.prose)


def test_a_prefix_doubles_when_it_is_mastered():
    curriculum = Curriculum(RecallTask(keys=6, values=16, questions=4, prefix=60 + 4))
    assert curriculum.prefix == 16
    seen = []
    for loss in [2.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 2.7, 0.1, 0.6]:
        curriculum.saw(loss)
        seen.append(curriculum.prefix)
    assert seen[:8] == [16] * 8
    assert sorted(set(seen)) == [16, 32, 64]


@pytest.mark.parametrize("wrong", [dict(prefix=15), dict(prefix=4, keys=8), dict(questions=5)])
def test_a_task_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"prefix must be whole blocks|questions must be from 1"):
        RecallTask(**{**dict(keys=4, values=4, questions=2, prefix=16), **wrong})
