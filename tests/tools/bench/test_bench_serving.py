"""The serving bench, without vLLM: what it asks of engines, what it makes of their answers, and what a cut run keeps."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from tsa_compile.tools.bench.serving import Bench
from tsa_compile.tools.bench.serving_cases import CASES, Sizes, compare, join
from tsa_compile.tools.bench.serving_quality import distance


def test_a_short_model_gets_a_prompt_that_fits():
    sizes = Sizes.of(8192, None, (4096,), 3, 0.05, False)
    assert sizes.lengths == (8128,)
    assert sizes.engine("sparse", "m", False)["max_model_len"] == 8192
    assert [task["name"] for task in CASES["quality"](sizes)] == ["quality by 4096", "quality by 2048", "quality by 512"]


def test_only_alpha_differs_where_every_key_is_read():
    (task,) = CASES["agree"](Sizes.of(200_000, None, None, 3, None, False))
    own, ours = task["engines"]["own"], task["engines"]["sparse"]
    assert ours.pop("alpha") == 0.0
    assert own == ours


def test_both_sides_have_the_same_engine_but_for_attention():
    sizes = Sizes.of(200_000, None, None, 3, 0.9, False)
    own, ours = sizes.engine("own", "m", True), sizes.engine("sparse", "m", True)
    assert ours.pop("additional_config")["tsa"]["alpha"] == 0.9
    assert ours.pop("attention_backend") == "CUSTOM"
    assert own == ours


def test_two_processes_need_an_alpha():
    with pytest.raises(ValueError, match="--alpha"):
        CASES["parallel"](Sizes.of(200_000, None, None, 3, None, False))


def test_tokens_agree_up_to_the_first_that_differs():
    a = {"tokens": [[1, 2, 3], [4, 5]], "logprobs": [[-1.0, -2.0, -3.0], [-1.0, -1.0]]}
    b = {"tokens": [[1, 2, 9], [4, 5]], "logprobs": [[-1.0, -2.5, -9.0], [-1.0, -1.0]]}
    assert compare(a, b) == {"agreed": [2, 2], "of": [3, 2], "largest_difference": 0.5}


def test_ratios_are_of_medians():
    a, b = ({"times": [{"ttft": x, "tpot": 1.0} for x in found]} for found in ((4.0, 8.0, 6.0), (2.0, 3.0, 9.0)))
    assert join("ttft", a, b)["ttft_ratio"] == 2.0


def test_distance_of_logits(tmp_path):
    own, ours = tmp_path / "a.pt", tmp_path / "b.pt"
    a = torch.zeros(512, 2)
    b = a.clone()
    b[:-128, 0] = math.log(3)  # one half each, against three quarters and one
    torch.save(a, own)
    torch.save(b, ours)
    found = distance(str(own), str(ours))
    assert found["kl_last"] == 0
    assert found["kl_before"] == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert not own.exists()
    assert not ours.exists()


def test_a_run_that_is_cut_keeps_what_it_had(tmp_path, monkeypatch):
    given = argparse.Namespace(
        out=tmp_path, model=None, smoke=True, limit=None, lengths=(512, 1024), chunks=(512,), repeats=1, alpha=0.5
    )

    def child(self, name, tasks, words):
        yield {"name": "start"}
        yield {"name": tasks[0]["name"], "times": [{"ttft": 1.0, "tpot": 2.0}]}
        if name == "sparse":
            yield {"name": name, "failed": 1, "log": ""}

    monkeypatch.setattr(Bench, "child", child)
    assert Bench(given).run(["ttft"]) == 1
    lines = [json.loads(line) for line in (tmp_path / "serving.jsonl").read_text().splitlines()]
    assert [(x["case"], x.get("engine")) for x in lines] == [
        ("start", "own"), ("ttft", "own"), ("start", "sparse"), ("ttft", "sparse"), ("ttft", None), ("failed", "sparse"),
    ]  # fmt: skip
    assert lines[4]["ttft_ratio"] == 1.0
