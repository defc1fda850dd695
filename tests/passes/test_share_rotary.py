"""Sines and cosines of positions are computed once a graph that Inductor compiles."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import tsa_compile as tsa
from tests.api.tiny import tiny_llama
from tsa_compile.passes.facts.names import op_name
from tsa_compile.passes.share_rotary import share_rotary


class Rotary(nn.Module):
    """Two layers' worth of readers of a cosine that is scaled and cast, as transformers has it; one of a sine."""

    def forward(self, angles, x):
        cos = (angles.cos() * 1.5).to(torch.bfloat16)
        return x * cos + (x + 1) * cos, x * angles.sin()


def traced(rows):
    graphs = []
    torch._dynamo.reset()
    keep = lambda gm, inputs: graphs.append(gm) or gm.forward  # noqa: E731
    args = torch.randn(1, rows, 8), torch.randn(1, rows, 8)
    want = torch.compile(Rotary(), backend=keep)(*args)
    return graphs[0], args, want


def test_what_several_layers_read_is_made_once():
    gm, args, want = traced(64)
    assert share_rotary(gm.graph) == 1, "the sine has one reader"
    gm.recompile()
    (copy,) = (n for n in gm.graph.nodes if op_name(n) == "materialize")
    assert op_name(copy.args[0]) == "to"
    assert list(copy.args[0].users) == [copy]
    assert len(copy.users) == 2
    for got, wanted in zip(gm(*args), want, strict=True):
        assert torch.equal(got, wanted)


def test_a_decode_step_computes_them_again():
    assert share_rotary(traced(4)[0].graph) == 0


@pytest.mark.slow
def test_inductor_computes_one_cosine_a_model():
    torch._dynamo.reset()
    model, ids = tiny_llama(num_hidden_layers=2), torch.randint(1, 100, (1, 96))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        tsa.transform(model, tsa.BlockSparse(0.0), compiler="inductor")
        got, codes = run_and_get_code(lambda: model(ids, use_cache=False).logits)
    code = "".join(codes)
    assert (code.count(".cos()"), code.count(".sin()")) == (1, 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
