"""Static caches of other code: which are proven, in Dynamo's graphs and in exported ones, and which must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.cache.static_models import BATCH, DIM, HEADS, KV_HEADS, ROWS, GptFast, IndexCopy, Slices, TorchTune, inputs
from tsa_compile.passes.facts.names import arg, op_name, tensor_of
from tsa_compile.passes.facts.sizes import SizeProver
from tsa_compile.passes.find.cache_index import Unproven
from tsa_compile.passes.find.cache_write import CacheWrites, KvWrite
from tsa_compile.passes.find.repeat_kv import RepeatedHeads


def by_dynamo(model: Any, *args: Any, dynamic: bool | None = None) -> torch.fx.GraphModule:
    torch._dynamo.reset()
    graphs = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    return graphs[-1]


def by_export(model: Any, *args: Any) -> torch.fx.GraphModule:
    with torch.no_grad():
        return torch.export.export(model, args).graph_module


def proven(gm: torch.fx.GraphModule) -> KvWrite:
    """The writes behind the operands of the graph's one attention."""
    node = next(n for n in gm.graph.nodes if op_name(n) == "scaled_dot_product_attention")
    heads = RepeatedHeads(SizeProver(gm.graph))
    (k, k_layout), (v, v_layout) = (heads.source(arg(node, n, ""), "bhld") for n in (1, 2))
    return CacheWrites(gm.graph).of(k, v, k_layout, v_layout)


def trace(form: str) -> Callable[..., torch.fx.GraphModule]:
    return {"dynamo": by_dynamo, "export": by_export}[form]


@pytest.mark.parametrize("form", ["dynamo", "export"])
@pytest.mark.parametrize("kind", [GptFast, TorchTune, IndexCopy, Slices])
@pytest.mark.parametrize("rows", [1, 4])
def test_static_caches_are_proven(kind, form, rows):
    model = kind().eval()
    found = proven(trace(form)(model, *inputs(model, rows, 5)))
    for write, name in ((found.keys, "k_cache"), (found.values, "v_cache")):
        assert name in write.buffer.name
        assert write.layout == ("blhd" if kind is Slices else "bhld")
        assert tensor_of(write.new).shape[write.layout.index("l")] == rows
        assert write.consecutive == (rows == 1 or kind in (IndexCopy, Slices))
    if kind is Slices:
        assert found.keys.positions == 5
    else:
        assert tensor_of(found.keys.positions).shape == (rows,)


@pytest.mark.parametrize("kind", [GptFast, TorchTune, IndexCopy, Slices])
def test_dynamic_lengths(kind):
    model = kind().eval()
    found = proven(by_dynamo(model, *inputs(model, 6, 5), dynamic=True))
    assert found.keys.consecutive == (kind in (IndexCopy, Slices))


@pytest.mark.parametrize("kind", [GptFast, TorchTune, IndexCopy])
def test_what_is_proven_is_what_happens(kind):
    """New rows and positions, read right behind the write, are the rows of the buffer: step after step."""
    model, seen = kind().eval(), []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        found = proven(gm).values
        with gm.graph.inserting_after(found.write):
            positions = gm.graph.call_method("clone", (found.positions,))
        output = next(n for n in gm.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], found.new, positions),)
        gm.recompile()

        def run(*flat: Any) -> Any:
            *results, new, at = gm(*flat)
            seen.append((new, at))
            return results

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(3):
        with torch.no_grad():
            compiled(*inputs(model, 1, step))
        new, at = seen[-1]
        assert at.tolist() == [step]
        assert torch.equal(model.v_cache[:, :, at], new)


def attend(k_read: Any, v_read: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(torch.ones(BATCH, HEADS, 1, DIM), k_read, v_read, enable_gqa=True)


def good(k, v, new, pos):
    k[:, :, pos] = new
    v[:, :, pos] = new
    return attend(k, v)


def written_twice(k, v, new, pos):
    k[:, :, pos] = new
    k[:, :, pos] = new * 2
    v[:, :, pos] = new
    return attend(k, v)


def other_rows(k, v, new, pos):
    k[:, :, pos] = new
    v[:, :, pos + 1] = new
    return attend(k, v)


def rows_move_in_between(k, v, new, pos):
    k[:, :, pos] = new
    pos.add_(1)
    v[:, :, pos] = new
    return attend(k, v)


def read_before(k, v, new, pos):
    old = k.clone()
    k[:, :, pos] = new
    v[:, :, pos] = new
    return attend(old, v)


def scaled(k, v, new, pos):
    k[:, :, pos] = new
    v[:, :, pos] = new
    return attend(k * 2, v)


def a_later_part(k, v, new, pos):
    k[:, :, pos] = new
    v[:, :, pos] = new
    return attend(k[:, :, 3:], v[:, :, 3:])


def broadcast_over_the_batch(k, v, new, pos):
    k[:, :, pos] = new[:1]
    v[:, :, pos] = new[:1]
    return attend(k, v)


def one_row_to_many(k, v, new, pos):
    k[:, :, torch.cat([pos, pos + 1])] = new
    v[:, :, torch.cat([pos, pos + 1])] = new
    return attend(k, v)


def by_heads(k, v, new, pos):
    """The tensor indexes heads, not rows."""
    k[:, pos[:1] * 0, :1] = new[:, :1]
    v[:, pos[:1] * 0, :1] = new[:, :1]
    return attend(k, v)


def from_the_end(k, v, new, pos):
    k[:, :, -2:-1] = new
    v[:, :, -2:-1] = new
    return attend(k, v)


def added(k, v, new, pos):
    k.index_put_((torch.tensor([0, 1])[:, None], torch.tensor([[0, 1]]), pos), new[:, :, 0], accumulate=True)
    v[:, :, pos] = new
    return attend(k, v)


def concatenated(k, v, new, pos):
    return attend(torch.cat([k, new], 2), torch.cat([v, new], 2))


def one_buffer(k, v, new, pos):
    k[:, :, pos] = new
    return attend(k, k)


MUST_NOT = {
    written_twice: "2 times",
    other_rows: "not proven the same",
    rows_move_in_between: "not proven the same",
    read_before: "before",
    scaled: "computed",
    a_later_part: "computed",
    broadcast_over_the_batch: "broadcast|other dimensions",
    one_row_to_many: "several positions",
    by_heads: "not written from its first entry on",
    from_the_end: "counted from the first",
    added: "adds",
    concatenated: "computed",
    one_buffer: "one buffer",
}


def operands() -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(BATCH, KV_HEADS, ROWS, DIM), torch.randn(BATCH, KV_HEADS, ROWS, DIM)
    return k, v, torch.randn(BATCH, KV_HEADS, 1, DIM), torch.tensor([4])


class Wrapped(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@pytest.mark.parametrize("form", ["dynamo", "export"])
def test_the_good_twin(form):
    found = proven(trace(form)(Wrapped(good), *operands()))
    assert found.keys.consecutive


@pytest.mark.parametrize("form", ["dynamo", "export"])
@pytest.mark.parametrize("function", MUST_NOT, ids=lambda f: f.__name__)
def test_must_not(function, form):
    with pytest.raises(Unproven, match=MUST_NOT[function]):
        proven(trace(form)(Wrapped(function), *operands()))


def test_the_static_cache_of_transformers():
    """All layers of a decode step, as `generate(cache_implementation="static")` runs it."""
    transformers = pytest.importorskip("transformers")
    from tests.cache.models import cache_name, tiny, token_ids

    model = tiny("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(token_ids(9), **{cache_name(model): cache})
    gm = by_dynamo(lambda ids: model(ids, **{cache_name(model): cache}).logits, token_ids(1))
    heads, found = RepeatedHeads(SizeProver(gm.graph)), []
    for node in gm.graph.nodes:
        if op_name(node) == "scaled_dot_product_attention":
            (k, _), (v, _) = (heads.source(arg(node, n, ""), "bhld") for n in (1, 2))
            found.append(CacheWrites(gm.graph).of(k, v))
    assert len(found) == 2
    assert all(write.consecutive for pair in found for write in pair)
