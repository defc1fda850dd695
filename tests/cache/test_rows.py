"""Any sequence of appends, crops, reorderings, resets against a naive list of tensors; states against rebuilt ones."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.cache import storage
from tsa_compile.cache.kv_state import PAGE, Field, KvState
from tsa_compile.cache.page_sums import PageSums
from tsa_compile.cache.rows import Rows
from tsa_compile.cache.storage import Lease, Pool, capacity_for

HEADS, DIM, V_DIM = 2, 3, 5


class Selection(KvState):
    """Remembered: one number for each batch row."""

    name = "selection"
    remembered = True

    def fields(self, size):
        return (Field("index", (size.batch, 1), torch.int32),)


def new_rows(batch: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, rows, DIM), torch.randn(batch, HEADS, rows, V_DIM)


def page_sums(keys: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The sums of every full page of each batch row, `[Hk, pages, D]`."""
    sums = []
    for n, row in enumerate(keys):
        weight = torch.ones(row.shape[1]) if mask is None else mask[n, : row.shape[1]].float()
        full = row.shape[1] // PAGE * PAGE
        sums.append((row * weight[:, None])[:, :full].unflatten(1, (-1, PAGE)).sum(2))
    return sums


class Model:
    """The rows as a list of tensors `[Hk, rows, D]`, one for each batch row, beside the rows under test."""

    def __init__(self, batch: int, masked: bool) -> None:
        self.pool = Pool()
        self.rows = Rows(Lease(self.pool), (PageSums(), Selection()))
        self.batch, self.masked = batch, masked
        self.keys: list[torch.Tensor] = [torch.zeros(HEADS, 0, DIM)] * batch
        self.values: list[torch.Tensor] = [torch.zeros(HEADS, 0, V_DIM)] * batch
        self.mask = torch.rand(batch, 400) < 0.8

    def append(self, n: int) -> None:
        keys, values = new_rows(len(self.keys), n)
        self.rows.lease.key_mask = self.mask if self.masked else None
        self.rows.append(keys, values)
        self.keys = [torch.cat([a, b], 1) for a, b in zip(self.keys, keys, strict=True)]
        self.values = [torch.cat([a, b], 1) for a, b in zip(self.values, values, strict=True)]

    def crop(self, n: int) -> None:
        self.rows.remove_last(n)
        self.keys = [k[:, : max(0, k.shape[1] - n)] for k in self.keys]
        self.values = [v[:, : max(0, v.shape[1] - n)] for v in self.values]

    def ragged(self, n: int) -> None:
        """Each batch row keeps another number of rows."""
        lengths = [max(0, k.shape[1] - (n + i) % 5) for i, k in enumerate(self.keys)]
        if self.rows.buffers is not None:
            self.rows.set_lengths(torch.tensor(lengths), max(lengths))
            self.keys = [k[:, :m] for k, m in zip(self.keys, lengths, strict=True)]
            self.values = [v[:, :m] for v, m in zip(self.values, lengths, strict=True)]

    def select(self, n: int) -> None:
        index = torch.randint(len(self.keys), (1 + n % 4,))
        if self.rows.count():
            self.rows.select_batch(index)
            self.keys, self.values = ([x[i] for i in index] for x in (self.keys, self.values))
            self.mask = self.mask[index]

    def reset(self, n: int) -> None:
        self.rows.clear()
        self.keys = [k[:, :0] for k in self.keys]
        self.values = [v[:, :0] for v in self.values]

    def assign(self, n: int) -> None:
        if self.rows.count():
            rows = Rows(Lease(self.pool), self.rows.states.kinds)
            rows.keys, rows.values = self.rows.keys, self.rows.values  # as code does that does not know these layers
            rows.key_mask = self.rows.key_mask
            if self.rows.lengths is None:
                self.rows = rows

    def write_behind(self, n: int) -> None:
        """Someone writes a key without telling."""
        if self.keys[0].shape[1]:
            place = n % self.keys[0].shape[1]
            self.rows.keys[0, :, place] = 7.0
            self.keys[0] = self.keys[0].clone()
            self.keys[0][:, place] = 7.0

    def check(self) -> None:
        if self.rows.count() == 0:
            assert all(k.shape[1] == 0 for k in self.keys)
            return
        for n, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            assert torch.equal(self.rows.keys[n, :, : keys.shape[1]], keys)
            assert torch.equal(self.rows.values[n, :, : values.shape[1]], values)
            assert int(self.rows.row_lengths()[n]) == keys.shape[1]
        sums = self.rows.state("page_sums")["sums"]
        for n, want in enumerate(page_sums(self.keys, self.mask if self.masked else None)):
            torch.testing.assert_close(sums[n, :, : want.shape[1]], want)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "crop", "ragged", "select", "reset", "assign", "write_behind"]),
        st.integers(1, 40),
        st.booleans(),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, batch=st.integers(1, 3), masked=st.booleans(), seed=st.integers(0, 1000))
def test_any_sequence(steps, batch, masked, seed):
    torch.manual_seed(seed)
    first, chunk, storage.FIRST, storage.CHUNK = storage.FIRST, storage.CHUNK, 32, 16
    try:
        model = Model(batch, masked)
        for name, number, checked in steps:
            getattr(model, name)(number)
            if checked:
                model.check()
        model.check()
    finally:
        storage.FIRST, storage.CHUNK = first, chunk


def filled(rows: int, batch: int = 2, pool: Pool | None = None) -> Rows:
    made = Rows(Lease(Pool() if pool is None else pool), (PageSums(), Selection()))
    made.append(*new_rows(batch, rows))
    return made


def test_rows_beyond_the_length_are_never_read():
    rows, clean = filled(40), filled(40)
    clean.keys, clean.values = rows.keys, rows.values
    for buffer in rows.buffers[:2]:
        buffer[:, :, 40:] = float("nan")
    rows.states.settle(*rows.buffers[:2])
    for step in range(30):
        for keys, values in [new_rows(2, 1 + step % 3)]:
            rows.append(keys, values)
            clean.append(keys, values)
    assert torch.equal(rows.keys, clean.keys)
    assert torch.equal(rows.values, clean.values)
    full = rows.length // PAGE
    assert torch.equal(rows.state("page_sums")["sums"][:, :, :full], clean.state("page_sums")["sums"][:, :, :full])


def test_each_batch_row_at_its_own_place():
    """Rows between a batch row's end and the longest one's are finite, whatever lay there."""
    rows = filled(20)
    for buffer in rows.buffers[:2]:
        buffer[:, :, 20:] = float("nan")
    keys, values = new_rows(2, 3)
    seen, _ = rows.append(keys, values, at=torch.tensor([15, 20]))
    assert rows.row_lengths().tolist() == [18, 23]
    assert torch.equal(seen[0, :, 15:18], keys[0])
    assert torch.equal(seen[1, :, 20:23], keys[1])
    assert seen.isfinite().all()


def test_appending_copies_nothing_until_the_buffer_is_full():
    rows = filled(100)
    address, stride = rows.keys.data_ptr(), rows.keys.stride()
    while rows.length < capacity_for(100):
        rows.append(*new_rows(2, 100 if rows.length + 100 < capacity_for(100) else 1))
        assert (rows.keys.data_ptr(), rows.keys.stride()) == (address, stride)
    rows.append(*new_rows(2, 1))
    assert rows.keys.data_ptr() != address


def test_capacities_grow_by_chunks():
    assert [capacity_for(n) for n in (0, 1024, 1025, 4097, 8193, 131072)] == [1024, 1024, 2048, 8192, 12288, 134272]
    for rows in (1, 5000, 10**5, 10**6):
        assert rows <= capacity_for(rows) <= rows + max(4096, rows / 8)


def test_remembered_state_survives_a_roll_back_and_nothing_more():
    rows = filled(60)
    assert rows.state("selection") is None
    rows.remember("selection")["index"].fill_(5)
    rows.append(*new_rows(2, 7))
    rows.remove_last(12)
    rows.select_batch(torch.tensor([1, 0, 1]))
    assert rows.state("selection")["index"].tolist() == [[5], [5], [5]]
    rows.remove_last(20)
    assert rows.state("selection") is None
    assert rows.states.dropped == 1


def test_a_write_behind_our_back_drops_what_was_remembered():
    rows = filled(60)
    rows.remember("selection")
    rows.values.mul_(2)
    assert rows.state("selection") is None
    assert (rows.states.rebuilt, rows.states.dropped) == (1, 1)
    rows.state("page_sums")
    assert rows.states.rebuilt == 1


def test_a_storage_serves_the_next_request():
    pool = Pool()
    rows = filled(60, pool=pool)
    address = rows.buffers.keys.data_ptr()
    del rows
    gc.collect()
    assert len(pool) == 1
    again = filled(70, pool=pool)
    assert again.buffers.keys.data_ptr() == address
    assert filled(70, pool=pool).buffers.keys.data_ptr() != address, "two requests at a time"
    assert filled(70, batch=3, pool=pool).keys.shape[0] == 3


def test_a_view_outlives_its_cache():
    """Someone keeps the keys of a request that is gone: the next one must not write into them."""
    pool = Pool()
    rows = filled(60, pool=pool)
    kept, copied = rows.keys, rows.keys.clone()
    del rows
    gc.collect()
    filled(60, pool=pool)
    assert torch.equal(kept, copied)


def test_growth_gives_the_smaller_storage_back():
    pool = Pool()
    lease = Lease(pool)
    layers = [Rows(lease) for _ in range(2)]
    for layer in layers:
        layer.append(*new_rows(1, 1000))
    small = lease.storage
    layers[0].append(*new_rows(1, 100))
    assert len(pool) == 0, "the second layer still uses it"
    layers[1].append(*new_rows(1, 100))
    assert len(pool) == 1
    assert pool.lease(1, small.capacity) is small


def test_errors_name_the_argument():
    rows = filled(5)
    with pytest.raises(ValueError, match="batch 3, but the cache holds rows of batch 2"):
        rows.append(*new_rows(3, 1))
    with pytest.raises(ValueError, match="longest: 6"):
        rows.set_lengths(torch.tensor([5, 5]), 6)
    with pytest.raises(ValueError, match="'page_sums' is no remembered state"):
        rows.remember("page_sums")
    with pytest.raises(ValueError, match="same name"):
        Rows(states=(PageSums(), PageSums()))
    rows.keys = torch.zeros(2, HEADS, 4, DIM)
    with pytest.raises(ValueError, match="assigned together"):
        rows.append(*new_rows(2, 1))


def test_rows_written_in_inference_mode_are_noticed():
    with torch.inference_mode():
        rows = filled(40)
        rows.append(*new_rows(2, 1))
        assert not rows._is_stale()
        rows.keys[0, 0, 0] = 1.0
        assert rows._is_stale()
    rows.append(*new_rows(2, 1))
    assert rows.states.rebuilt == 1
