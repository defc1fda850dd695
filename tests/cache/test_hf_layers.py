"""Our layers against those of transformers: the same rows, lengths and mask sizes after any sequence of calls."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import tsa_compile.cache as cache_module
from tests.cache.models import tiny
from tsa_compile.cache.entry import prepare
from tsa_compile.cache.fixed import pinned
from tsa_compile.cache.hf_layers import layer_types
from tsa_compile.cache.lease import Lease
from tsa_compile.cache.page_sums import PageSums
from tsa_compile.cache.place import Place
from tsa_compile.cache.storage import Pool


def pairs(window: int) -> tuple[Any, Any]:
    """(plain layer, ours); window 0: a full layer."""
    if window:
        return DynamicSlidingWindowLayer(sliding_window=window), layer_types().sliding(sliding_window=window)
    return DynamicLayer(), layer_types().full()


def step(layer: Any, name: str, n: int, rows: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """One call; what it returns, or the kind of its error."""
    try:
        if name == "update":
            return layer.update(*rows)
        if name == "crop":
            return layer.crop(-(n % 6))
        if name == "reorder":
            return layer.reorder_cache(torch.arange(rows[0].shape[0]).roll(n))
        if name == "repeat":
            return layer.batch_repeat_interleave(1 + n % 2)
        if name == "select":
            return layer.batch_select_indices(torch.arange(rows[0].shape[0])[: 1 + n % 3])
        if name == "record":
            return layer.activate_past_recording() if hasattr(layer, "activate_past_recording") else None
    except RuntimeError as error:
        return type(error)
    raise AssertionError(name)


def same(got: Any, want: Any) -> bool:
    if isinstance(want, tuple):
        return all(map(same, got, want))
    return torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["update", "update", "update", "crop", "reorder", "repeat", "select", "record", "copy"]),
        st.sampled_from([1, 1, 1, 2, 3, 5, 9, 30]),
    ),
    max_size=14,
)


@settings(max_examples=80, deadline=None)
@example(calls=[("update", 3), ("record", 1), ("crop", 1), ("repeat", 1), ("update", 1)], window=2, seed=0)
@example(calls=[("update", 3), ("record", 1), ("crop", 1), ("copy", 1), ("crop", 1)], window=2, seed=0)
@example(calls=[("update", 4), ("record", 1), ("crop", 1), ("crop", 1)], window=4, seed=0)
@given(calls=CALLS, window=st.sampled_from([0, 2, 4, 9]), seed=st.integers(0, 100))
def test_any_sequence_of_calls(calls, window, seed):
    torch.manual_seed(seed)
    plain, ours = pairs(window)
    batch = 2
    for name, n in calls:
        if name == "copy":
            ours, plain = copy.deepcopy(ours), copy.deepcopy(plain)
            continue
        if plain.is_initialized and plain.keys.dim() == 4:  # also of no rows
            batch = plain.keys.shape[0]
        if name == "crop" and (not plain.is_initialized or n % 6 > plain.get_seq_length()):
            continue  # an error, or a negative length, in some versions
        rows = torch.randn(batch, 2, n, 3), torch.randn(batch, 2, n, 4)
        seen = plain.get_mask_sizes(n)[0]
        got, want = step(ours, name, n, rows), step(plain, name, n, rows)
        if name == "update":  # transformers 5.17, recording the past, returns older rows than its own mask has
            want = tuple(t[:, :, max(0, t.shape[2] - seen) :] for t in want)
        assert same(got, want), name
        assert ours.get_seq_length() == plain.get_seq_length()
        assert ours.get_mask_sizes(n) == plain.get_mask_sizes(n)
        if plain.get_seq_length():
            assert same((ours.keys, ours.values), (plain.keys, plain.values))


def test_reset_empties_the_cache():
    for window in (0, 4):
        layer = pairs(window)[1]
        layer.update(torch.ones(2, 2, 9, 3), torch.ones(2, 2, 9, 3))
        layer.reset()
        assert layer.get_seq_length() == 0
        rows = torch.randn(1, 2, 3, 3)
        assert torch.equal(layer.update(rows, rows)[0], rows)


def test_rows_of_a_compiled_graph_wait_for_the_next_call():
    """A graph holds no allocation of ours; what it appended is there afterwards, and goes on growing."""
    for window in (0, 6):
        torch._dynamo.reset()
        plain, ours = pairs(window)
        append = torch.compile(lambda layer, k, v: layer.update(k, v), backend="eager", fullgraph=True)
        for n in (9, 4, 1):
            rows = torch.randn(2, 2, n, 3), torch.randn(2, 2, n, 4)
            assert same(append(ours, *rows), plain.update(*rows))
            assert ours.get_seq_length() == plain.get_seq_length()
            assert same((ours.keys, ours.values), (plain.keys, plain.values))
            rows = torch.randn(2, 2, 2, 3), torch.randn(2, 2, 2, 4)
            assert same(ours.update(*rows), plain.update(*rows))


def test_rows_of_two_dtypes_are_promoted():
    for window in (0, 6):
        plain, ours = pairs(window)
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            rows = torch.randn(2, 2, 3, 3).to(dtype)
            got, want = ours.update(rows, rows), plain.update(rows, rows)
            assert got[0].dtype == want[0].dtype
            assert same(got, want)


def test_a_cache_with_room_from_the_start():
    model = tiny("llama")
    cache = cache_module.Cache(model, batch=2, max_length=3000)
    assert type(cache) is DynamicCache
    rows = torch.randn(2, 2, 5, 16)
    cache.update(rows, rows, 0)
    assert cache.layers[0].buffers.keys.shape[2] == 4096
    with pytest.raises(ValueError, match="batch: the cache was made for 4"):
        cache_module.Cache(model, batch=4, max_length=10).update(rows, rows, 0)
    with pytest.raises(ValueError, match="max_length: 0"):
        cache_module.Cache(model, 1, 0)


def test_prepare_turns_a_cache_in_place_and_once():
    cache, pool = DynamicCache(config=tiny("mistral").config), Pool()
    with torch.no_grad():
        prepare((), {"cache": cache}, pool)
        layers = list(cache.layers)
        assert [type(layer) for layer in layers] == [layer_types().sliding] * 2
        prepare((), {"cache": cache}, pool)
    assert all(a is b for a, b in zip(layers, cache.layers, strict=True))


def test_pinned_steps_are_one_graph_and_the_same_rows():
    """One compiled graph serves all steps; rows and states are those of steps that were not pinned."""
    torch._dynamo.reset()
    types, graphs = layer_types(), []
    free, pinned = (types.full(states=(PageSums(),)) for _ in range(2))
    start = torch.randn(2, 2, 20, 3), torch.randn(2, 2, 20, 4)
    for layer in (free, pinned):
        layer.update(*start)
    for buffer in pinned.buffers[:2]:
        buffer[:, :, 20:] = float("nan")
    pinned.states.settle(*pinned.buffers[:2])
    place = pinned.storage.place(torch.device("cpu"), torch.int64)

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    step = torch.compile(lambda layer, k, v: layer.update(k, v), backend=backend, fullgraph=True)
    for _ in range(15):
        rows = torch.randn(2, 2, 1, 3), torch.randn(2, 2, 1, 4)
        place.move(pinned.length, None, None)
        pinned.pin(place)
        assert pinned.get_seq_length() is place.offset
        keys, values = step(pinned, *rows)
        assert keys.shape[2] == pinned.get_mask_sizes(1)[0] == 1024
        assert keys.isfinite().all()
        assert values.isfinite().all()
        pinned.advance(1)
        free.update(*rows)
    assert len(graphs) == 1
    assert pinned.states.rebuilt == 0
    sums = [layer.state("page_sums")["sums"][:, :, :2] for layer in (pinned, free)]
    torch.testing.assert_close(*sums)
    pinned.unpin()
    assert same((pinned.keys, pinned.values), (free.keys, free.values))
    assert same(pinned.update(*rows), free.update(*rows))


def test_pinned_rows_do_not_outgrow_the_buffers():
    layer = layer_types().full()
    layer.update(torch.ones(1, 2, 1020, 3), torch.ones(1, 2, 1020, 3))
    layer.pin(layer.storage.place(torch.device("cpu"), torch.bool))
    assert layer.has_room(4)
    assert not layer.has_room(5)
    with pytest.raises(ValueError, match="rows: 5"):
        layer.advance(5)
    with pytest.raises(ValueError, match=r"place.at: \[2\] on cpu; allowed: \[1\] on cpu"):
        layer.pin(Place(2, 1024, torch.device("cpu"), torch.bool))
    layer.grow(5)
    assert layer.has_room(5)
    assert layer.keys.shape[2] == 1020


def test_layers_on_two_devices_have_a_place_on_each():
    """The second device is "meta", which computes nothing: what is shown is where tensors are."""
    lease, new = Lease(Pool()), torch.randn(2, 2, 20, 3)
    layers = [layer_types().full(lease=lease, states=(PageSums(),)) for _ in range(2)]
    lease.key_mask = torch.ones(2, 20, dtype=torch.bool)
    for layer, device in zip(layers, ("cpu", "meta"), strict=True):
        layer.update(new.to(device), new.to(device))
    mask = torch.ones(2, 21, dtype=torch.int64)
    with pinned(layers, {"attention_mask": mask}, 1) as fixed:
        assert fixed["attention_mask"] is layers[0].pinned.mask
        assert fixed["attention_mask"][:, :21].eq(1).all()
        for layer, device in zip(layers, ("cpu", "meta"), strict=True):
            assert {x.device.type for x in (layer.pinned.at, layer.pinned.offset, layer.pinned.key_mask)} == {device}
            keys, _ = layer.update(new[:, :, :1].to(device), new[:, :, :1].to(device))
            assert keys.device.type == device
    assert torch.equal(layers[0].settled().keys[:, :, 20], new[:, :, 0])


def test_pickled_as_the_layers_of_transformers():
    model = tiny("gemma3")
    cache = cache_module.Cache(model, batch=2, max_length=100)
    rows = [(torch.randn(2, 2, n, 16), torch.randn(2, 2, n, 16)) for n in (30, 1)]
    for layer in range(2):
        cache.update(*rows[0], layer)
    loaded = pickle.loads(pickle.dumps(cache))
    assert [type(layer) for layer in loaded.layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    for layer in range(2):
        assert same(loaded.update(*rows[1], layer), cache.update(*rows[1], layer))


def test_inference_mode_and_back():
    """A storage made in inference mode serves the next request outside of it."""
    pool = Pool()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        cache = DynamicCache(config=tiny("gemma3").config)
        with mode():
            prepare((), {"cache": cache}, pool)
            for n in (30, 1):
                cache.update(torch.ones(1, 2, n, 16), torch.ones(1, 2, n, 16), 1)
        del cache
    assert len(pool) == 1
