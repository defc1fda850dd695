"""Static caches of other code: which are proven, in Dynamo's graphs and in exported ones, and which must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch.nn import functional as F

from tests.cache.static_models import BATCH, DIM, HEADS, KV_HEADS, ROWS, GptFast, IndexCopy, Slices, TorchTune
from tsa_compile.passes.facts.graph_facts import GraphFacts
from tsa_compile.passes.facts.names import arg, op_name, tensor_of
from tsa_compile.passes.find.cache_index import Unproven
from tsa_compile.passes.find.cache_write import CacheWrites, KvWrite
from tsa_compile.passes.find.repeat_kv import RepeatedHeads

KINDS = (GptFast, TorchTune, IndexCopy, Slices)


def by_dynamo(model: Any, *args: Any, dynamic: bool | None = None) -> fx.GraphModule:
    torch._dynamo.reset()
    graphs = []

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    return graphs[-1]


def by_export(model: Any, *args: Any) -> fx.GraphModule:
    with torch.no_grad():
        return torch.export.export(model, args).graph_module


TRACES: dict[str, Callable[..., fx.GraphModule]] = {"dynamo": by_dynamo, "export": by_export}


class Proofs:
    """Of the attentions of one graph, in order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        facts = GraphFacts(gm.graph)
        self._writes, self._heads = CacheWrites(facts), RepeatedHeads(facts.sizes)
        self._nodes = [n for n in gm.graph.nodes if op_name(n) == "scaled_dot_product_attention"]

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, n: int) -> KvWrite:
        (k, k_layout), (v, v_layout) = (self._heads.source(arg(self._nodes[n], i, ""), "bhld") for i in (1, 2))
        return self._writes.of(k, v, k_layout, v_layout)


class All(nn.Module):
    """All forms of caches, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(kind() for kind in KINDS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, input_pos: torch.Tensor, start: int) -> list[torch.Tensor]:
        return [part(x, start) if isinstance(part, Slices) else part(x, mask, input_pos) for part in self.parts]


def proven(form: str, rows: int, **options: Any) -> dict[type, KvWrite]:
    x, mask = torch.randn(BATCH, rows, HEADS * DIM), torch.ones(ROWS, ROWS, dtype=torch.bool).tril()[5 : 5 + rows]
    found = Proofs(TRACES[form](All().eval(), x, mask, torch.arange(5, 5 + rows), 5, **options))
    return {kind: found[n] for n, kind in enumerate(KINDS)}


@pytest.mark.parametrize("form", TRACES)
@pytest.mark.parametrize("rows", [1, 4])
def test_static_caches_are_proven(form, rows):
    for kind, found in proven(form, rows).items():
        for write, name in ((found.keys, "k_cache"), (found.values, "v_cache")):
            assert name in write.buffer.name
            assert write.layout == ("blhd" if kind is Slices else "bhld")
            assert tensor_of(write.new).shape[write.layout.index("l")] == rows
            assert write.consecutive == (rows == 1 or kind in (IndexCopy, Slices))
        if kind is Slices:
            assert found.keys.positions == 5
        else:
            assert tensor_of(found.keys.positions).shape == (rows,)


@pytest.mark.slow
def test_dynamic_lengths():
    for kind, found in proven("dynamo", 6, dynamic=True).items():
        assert found.keys.consecutive == (kind in (IndexCopy, Slices))


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


class SideBySide(nn.Module):
    """Each function on tensors of its own."""

    def forward(self, given: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        return [function(*tensors) for function, tensors in zip((good, *MUST_NOT), given, strict=True)]


def operands() -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(BATCH, KV_HEADS, ROWS, DIM), torch.randn(BATCH, KV_HEADS, ROWS, DIM)
    return k, v, torch.randn(BATCH, KV_HEADS, 1, DIM), torch.tensor([4])


@pytest.mark.parametrize("form", TRACES)
def test_must_not(form):
    found = Proofs(TRACES[form](SideBySide(), [operands() for _ in (good, *MUST_NOT)]))
    assert len(found) == 1 + len(MUST_NOT)
    assert found[0].keys.consecutive
    for n, (function, reason) in enumerate(MUST_NOT.items(), 1):
        with pytest.raises(Unproven, match=reason):
            pytest.fail(f"{function.__name__}: {found[n]}")


@pytest.mark.slow
def test_the_static_cache_of_transformers():
    """All layers of a decode step, as `generate(cache_implementation="static")` runs it."""
    transformers = pytest.importorskip("transformers")
    from tests.cache.models import cache_name, tiny, token_ids

    model = tiny("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(token_ids(9), **{cache_name(model): cache})
    found = Proofs(by_dynamo(lambda ids: model(ids, **{cache_name(model): cache}).logits, token_ids(1)))
    assert len(found) == 2
    assert all(found[n].keys.consecutive for n in range(2))
