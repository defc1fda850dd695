"""Which calls of a graph write in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from tsa_compile.passes.facts.mutation import writes_to


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "writes"),
    [
        (F.dropout, (0.5, True, True), {}, True),  # as nn.Dropout(inplace=True) calls it
        (F.dropout, (0.5, True), {"inplace": True}, True),
        (F.dropout, (0.5, True, False), {}, False),
        (F.dropout, (0.5, True), {}, False),
        (F.relu, (True,), {}, True),
        (F.relu, (), {}, False),
        (F.elu, (1.0, True), {}, True),
        (F.leaky_relu, (0.1, True), {}, True),
        (torch.relu_, (), {}, True),
        (torch.relu, (), {}, False),
        (torch.add, (1,), {}, False),
    ],
)
def test_a_function_that_writes_its_first_argument(function, args, kwargs, writes):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(function, (x, *args), kwargs)
    assert writes_to(node) == ([x] if writes else [])
