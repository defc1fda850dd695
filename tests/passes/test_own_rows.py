"""`tsa::attach_rows`: a cache layer's word for a mask is taken for that mask and that buffer, and for no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tsa_compile as tsa
from tests.generate.test_speculative import BATCH, both
from tsa_compile.backend import Backend
from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.session import attached

ROWS, LENGTH = 3, 20


class Step(nn.Module):
    """Attention over a buffer whose layer has said what `told` shows."""

    def forward(self, q, k, v, other_k, mask, told, lengths, start, mark):
        torch.ops.tsa.attach_rows.default(mark, lengths, told, start, other_k)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def operands(rows=ROWS):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16) for h, n in ((4, rows), (2, LENGTH), (2, LENGTH)))
    lengths, start = torch.tensor([15, 9], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    end, j = (start + lengths)[:, None, None], torch.arange(LENGTH)
    own = end - rows + torch.arange(rows)[:, None]
    mask = ((j >= start[:, None, None]) & (j <= own))[:, None]
    return q, k, v, mask, lengths, start, torch.zeros(1, dtype=torch.int8)


@pytest.mark.parametrize("other", [None, "buffer", "mask"])
def test_the_mask_and_the_buffer_that_are_meant(other):
    q, k, v, mask, lengths, start, mark = operands()
    call = (q, k, v, k.clone() if other == "buffer" else k, mask, mask.clone() if other == "mask" else mask, lengths, start, mark)
    torch._dynamo.reset()
    backend = Backend(tsa.Plan(decode=tsa.Exact(), verify=tsa.Exact()), compiler="eager")
    out = torch.compile(Step(), backend=backend)(*call)
    torch.testing.assert_close(out, Step()(*call), rtol=1e-5, atol=1e-5)
    ((site, _),) = backend.attentions()
    assert site.phase == "verify"
    assert site.mask.kind == ("causal" if other is None else "data")
    (graph,) = backend.graphs
    (attention,) = [n for n in graph.form(backend.plan).gm.graph.nodes if n.target is torch.ops.tsa.decode_attention.default]
    assert (attention.args[9] is None) == (other is None)  # the mask as data


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_site_that_stays_keeps_its_mask(rows):
    """The mask says where the keys end, which `is_causal` does not."""
    q, k, v, mask, lengths, start, mark = operands(rows)
    call = (q, k, v, k, mask, mask, lengths, start, mark)
    torch._dynamo.reset()
    out = torch.compile(Step(), backend=Backend(tsa.Plan(prefill=tsa.Dense()), compiler="eager"))(*call)
    torch.testing.assert_close(out, Step()(*call), rtol=1e-5, atol=1e-5)


def test_opcheck_and_bad_arguments():
    _, k, _, mask, lengths, start, mark = operands()
    kinds = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for first in (start, None):
        torch.library.opcheck(torch.ops.tsa.attach_rows.default, (mark, lengths, mask, first, k), test_utils=kinds)
    with pytest.raises(ValueError, match=r"attach_rows: mask must be bool \[B, 1, rows, L\]"):
        torch.ops.tsa.attach_rows(mark, lengths, mask[..., :5], start, k)
    with pytest.raises(ValueError, match=r"attach_rows: lengths must be int32 \[2\]"):
        torch.ops.tsa.attach_rows(mark, lengths.long(), mask, start, k)


@pytest.fixture(scope="module")
def models():
    from tests.cache.models import tiny

    torch._dynamo.reset()
    plain, ours = (tiny("llama", layers=1) for _ in range(2))
    return plain, tsa.transform(ours, tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact()))


HOLES = BATCH["attention_mask"].clone()
HOLES[:, 25:28] = 0


@pytest.mark.parametrize(
    ("call", "masked"),
    [
        pytest.param({}, False, marks=pytest.mark.slow),
        (BATCH, False),
        pytest.param({**BATCH, "attention_mask": torch.ones_like(HOLES)}, False, marks=pytest.mark.slow),
        ({**BATCH, "ids": BATCH["ids"] * HOLES, "attention_mask": HOLES}, True),
    ],
    ids=["one", "padded", "ones", "holes"],
)
def test_steps_of_speculation_need_no_mask_of_keys(models, call, masked):
    """Where nothing but first tokens is padding. Page sums follow the padding, too: drafts are as good."""
    session = attached(models[1])
    before = len(session.backend.graphs)
    want, got, seen = both(models, tsa.PageSparse(pages=2, sinks=0, recent=1), **call)
    assert torch.equal(want, got)
    assert not seen.notes
    graphs = session.backend.graphs[before:] or session.backend.graphs
    steps = [d.site for graph in graphs for form in graph._forms.values() for d in form.decisions if d.site.phase != "prefill"]
    if masked:
        assert any(site.mask.padded or site.mask.kind == "data" for site in steps)
    else:
        assert steps
        assert all(site.mask.kind == "causal" and not site.mask.padded for site in steps)
