"""Models with a static cache of their own: one transform, tokens as without it, page sums that follow the model's own writes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tsa_compile as tsa
from tests.cache.static_models import BATCH, ROWS, VOCABULARY, GptFast, IndexCopy, OwnCache, TorchTune, continued, decoder
from tsa_compile.cache.layer_states import KvStates
from tsa_compile.session import attached

EXACT, ALL_PAGES = tsa.Exact(), tsa.PageSparse(keep=1.0)
PAGES = tsa.PageSparse(keep=0.7, sinks=0, recent=1)
OWN = "static cache of the model's own"
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()


def prompt(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


def decode_rows(model: torch.nn.Module) -> list[tuple[str, bool, str]]:
    """(policy, replaced, reason) of the sites with one query row."""
    return [(s.policy, s.replaced, s.reason) for s in tsa.report(model).sites if s.q_len == "1"]


def kept(model: torch.nn.Module, layer: OwnCache) -> KvStates:
    """The one state that is kept beside a layer's buffers."""
    session = attached(model)
    (states,) = session.backend.own_buffers._known[layer.k_cache].values()
    return states


@pytest.mark.parametrize("padding", [None, pytest.param((0, 5), marks=SLOW)])
@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        (GptFast, EXACT),
        (TorchTune, ALL_PAGES),
        *(pytest.param(*case, marks=SLOW) for case in ((GptFast, ALL_PAGES), (TorchTune, EXACT), (IndexCopy, ALL_PAGES))),
    ],
)
def test_tokens_are_those_without_a_transform(kind, policy, padding):
    """Page sums are made once behind a prompt, and from then on each step brings its own page up to date."""
    model = decoder(kind)
    want = continued(model, prompt(45), 6, padding)
    tsa.transform(model, tsa.Plan(decode=policy))
    assert torch.equal(continued(model, prompt(45), 6, padding), want)
    remark = OWN if policy == EXACT else f"{OWN}, page sums kept beside it"
    assert decode_rows(model) == [(policy.name, True, remark)] * 2
    if policy != EXACT:
        check_sums(model, padding)
        continued(model, prompt(46), 2, padding)  # the next request, in the same buffers
        assert kept(model, model.layers[0]).rebuilt == 2


def step_graph(model: torch.nn.Module) -> torch.fx.Graph:
    """The rewritten graph of a decode step."""
    session = attached(model)
    return session.backend.graphs[-1].form(session.plan).gm.graph


def check_sums(model: torch.nn.Module, padding: tuple[int, ...] | None) -> None:
    """They are those of the buffers, of all pages that 51 rows have filled."""
    real = None if padding is None else torch.arange(ROWS) >= torch.tensor(padding)[:, None]
    for layer in model.layers:
        assert kept(model, layer).rebuilt == 1
        sums, counts = torch.ops.tsa.page_sums(layer.k_cache, None, 1, None, None, real)
        found = kept(model, layer).tensors["page_sums"]
        torch.testing.assert_close(found["sums"][:, :, :3], sums[:, :, :3])
        assert torch.equal(found["counts"][:, :, :3], counts[:, :, :3])


@pytest.mark.parametrize("kind", ["mean", pytest.param("basis", marks=SLOW)])
def test_kept_or_made_anew_is_the_same(kind):
    """A step, and the same one after someone else's write that changes nothing. Then a write that changes what is chosen."""
    model = decoder(GptFast)
    policy = dataclasses.replace(PAGES, kind=kind, completion=kind == "basis")
    tsa.transform(model, tsa.Plan(decode=policy))
    continued(model, prompt(55), 2)
    step = torch.tensor([[3]] * BATCH), torch.tensor([58])
    with torch.no_grad():
        model(*step)
        made = kept(model, model.layers[0]).rebuilt
        first = model(*step)
        assert kept(model, model.layers[0]).rebuilt == made
        model.layers[0].k_cache.mul_(1)
        torch.testing.assert_close(model(*step), first)
        assert kept(model, model.layers[0]).rebuilt == made + 1
        model.layers[0].k_cache[:, :, 16:32] *= 30
        changed = model(*step)
        assert not torch.allclose(changed, first)
        torch.testing.assert_close(model(*step), changed)
        sums = torch.ops.tsa.page_sums(model.layers[0].k_cache, None, 1, None, None, None)[0]
        torch.testing.assert_close(kept(model, model.layers[0]).tensors["page_sums"]["sums"][:, :, :3], sums[:, :, :3])


def test_a_row_is_written_anywhere():
    """Back into a full page, counted from the end, or past it: the sum of the page is right after each step."""
    model = decoder(GptFast)
    tsa.transform(model, tsa.Plan(decode=PAGES))
    continued(model, prompt(70), 2)
    for position in (20, -1, 3, 74):
        with torch.no_grad():
            model(torch.tensor([[position % 7]] * BATCH), torch.tensor([position]))
            assert sum(n.target is torch.ops.aten.bitwise_and.Scalar for n in step_graph(model).nodes) == 1  # for both layers
        page, buffer = position % ROWS // 16, model.layers[0].k_cache
        visible = torch.arange(ROWS) <= position % ROWS  # what the step's mask shows
        rows = (buffer * visible[:, None])[:, :, page * 16 : page * 16 + 16]
        torch.testing.assert_close(kept(model, model.layers[0]).tensors["page_sums"]["sums"][:, :, page], rows.sum(2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GptFast, TorchTune])
def test_by_inductor_and_in_inference_mode(kind):
    model = decoder(kind)
    want = continued(model, prompt(45), 6)
    tsa.transform(model, tsa.Plan(prefill=tsa.Dense(), decode=tsa.PageSparse(keep=1.0)), compiler="inductor")
    with torch.inference_mode():
        assert torch.equal(continued(model, prompt(45), 6), want)
    assert kept(model, model.layers[0]).rebuilt == 1


class TwoWrites(GptFast):
    def forward(self, x, mask, input_pos):
        self.k_cache[:, :, input_pos] = 0
        return super().forward(x, mask, input_pos)


def test_what_is_not_proven_is_said():
    model = decoder(TwoWrites)
    want = continued(model, prompt(20), 1)
    tsa.transform(model, tsa.Plan(decode=tsa.PageSparse(keep=1.0)))
    assert torch.equal(continued(model, prompt(20), 1), want)
    for policy, replaced, reason in decode_rows(model):
        assert (policy, replaced) == ("PageSparse", True)
        assert reason.startswith("page sums not kept between steps")
        assert "is written 2 times in the graph, not once" in reason


@pytest.mark.slow
def test_buffers_of_inference_mode_are_not_proven():
    """Their writes are not counted, so what is kept beside them could not be told to be stale."""
    with torch.inference_mode():
        model = decoder(GptFast)
        tsa.transform(model, tsa.Plan(decode=PAGES))
        continued(model, prompt(20), 2)
    assert all("whose writes PyTorch does not count" in reason for _, _, reason in decode_rows(model))
