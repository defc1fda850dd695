"""Rows and the storages behind them: growth, reuse, what is remembered, what is noticed; errors."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.cache.test_rows import DIM, HEADS, Selection, new_rows
from tsa_compile.cache.kv_state import PAGE
from tsa_compile.cache.lease import Lease
from tsa_compile.cache.page_sums import PageSums
from tsa_compile.cache.rows import Rows
from tsa_compile.cache.storage import Pool, capacity_for


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


def test_kinds_of_state_take_turns_over_the_same_rows():
    """What is recorded over one plan's buffers stays valid while another plan has its turn, and rows are not held twice."""
    pool, lease = Pool(), []
    for kinds in ((PageSums(),), (), (PageSums(),)):
        rows = Rows(Lease(pool), kinds)
        rows.append(*new_rows(2, 60))
        lease.append(rows.buffers)
        del rows
        gc.collect()
    assert lease[0] is lease[2]
    assert lease[0] is not lease[1]
    assert lease[1].states == {}
    assert all(lease[0][n] is lease[1][n] for n in (0, 1))


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
