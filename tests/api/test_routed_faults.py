"""What a model says under `Routed` when a rank dies, a group is not there, or ranks hold nothing: an error, and no hang."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tsa_compile as tsa
from tests.api.test_routed_policy import FAST, transformed
from tests.cache.models import cache_name, tiny, token_ids
from tests.cache.test_generate import generate
from tests.ranks import run_ranks
from tsa_compile.kernels.common.group import GroupError
from tsa_compile.kernels.common.spread import rows_held
from tsa_compile.session import attached

transformers = pytest.importorskip("transformers")
SHORT = dict(input_ids=token_ids(5), max_new_tokens=20)  # of two ranks one holds nothing until the 17th token


def faults(fetched: bool) -> Any:
    model = transformed(tsa.Routed(group="other"))
    with torch.no_grad(), pytest.raises(GroupError) as wrong:
        model(token_ids(5))
    attached(model).plan = tsa.Plan(prefill=tsa.Dense(), decode=tsa.Routed(link=FAST if fetched else None))
    cache, ids = transformers.DynamicCache(config=model.config), token_ids(40)
    short = generate(model, **SHORT)
    with torch.no_grad():
        model(ids, **{cache_name(model): cache})
        if not fetched:
            model(ids[:, :1], **{cache_name(model): cache})
        if dist.get_rank() == 1:
            os._exit(1)
        with pytest.raises(GroupError) as dead:
            model(ids[:, :1], **{cache_name(model): cache})
    return str(wrong.value), short, str(dead.value), cache.get_seq_length(), cache.layers[0].keys.shape[2]


@pytest.mark.slow  # two ranks that trace; tests/kernels/test_routed.py has the operator's faults
@pytest.mark.parametrize("fetched", [False, True])
def test_two_ranks(fetched):
    """A rank dies between two steps; with `link`, before the keys are fetched. The others' cache is as it was."""
    left, ended = run_ranks(2, faults, fetched, limit=200)
    assert ended is None
    assert not isinstance(left, str), left
    wrong, short, dead, length, held = left
    assert "group 'other': this process is in no process group of that name; its groups are ['0']" in wrong
    assert torch.equal(short, generate(tiny("llama", 1), **SHORT))
    assert "group '0': a rank has ended, or takes no part in this call" in dead
    assert length == (40 if fetched else 41)
    assert held == rows_held(length, 0, 2)


def uneven() -> Any:
    return generate(transformed(tsa.Routed()), **SHORT)


@pytest.mark.slow
def test_most_of_the_ranks_hold_nothing():
    """Of four ranks one holds the prompt, and two at the end."""
    want = generate(tiny("llama", 1), **SHORT)
    assert all(torch.equal(found, want) for found in run_ranks(4, uneven, limit=200))
