"""Lists of keys beside a cache layer: they follow its rows, and are dropped with those that they were chosen among."""

from __future__ import annotations

import pytest
import torch

from tsa_compile.cache import storage
from tsa_compile.cache.lease import Lease
from tsa_compile.cache.listed_keys import ListedKeys
from tsa_compile.cache.rows import Rows
from tsa_compile.cache.storage import Pool

KIND = ListedKeys(4, 0.5)


@pytest.fixture
def rows(monkeypatch):
    """40 rows of 2 sequences, listed at row 36: the even ones of the first, the odd ones of the second."""
    monkeypatch.setattr(storage, "FIRST", 64)
    rows = Rows(Lease(Pool()), (KIND,))
    append(rows, 40)
    state = rows.state(KIND.name)
    state["since"].fill_(36)
    state["counts"].fill_(18)
    state["indices"][:, :, :18] = (2 * torch.arange(18) + torch.tensor([[[0]], [[1]]])).int()
    return rows


def append(rows, n, at=None):
    batch = 2 if rows.buffers is None else rows.buffers.keys.shape[0]
    rows.append(torch.randn(batch, 3, n, 4), torch.randn(batch, 3, n, 5), at)


def since(rows):
    """(rows from which on all are read, numbers of listed ones) of each sequence."""
    state = rows.state(KIND.name)
    return state["since"].tolist(), state["counts"][:, 0].tolist()


def test_room_for_the_budget_of_a_full_buffer(rows):
    assert rows.state(KIND.name)["indices"].shape == (2, 3, 32)
    assert Rows(Lease(Pool()), (ListedKeys(100, 0.0),)).states.kinds[0].name != KIND.name


def test_kept_while_rows_come_and_a_draft_is_taken_back(rows):
    append(rows, 3)
    rows.remove_last(7)
    append(rows, 1)
    assert since(rows) == ([36, 36], [18, 18])
    rows.set_lengths(torch.tensor([36, 37]), 37)
    append(rows, 2, rows.lengths)
    assert since(rows) == ([36, 36], [18, 18])


def test_dropped_where_listed_rows_are_others_now(rows):
    rows.set_lengths(torch.tensor([35, 36]), 36)
    append(rows, 2, rows.lengths)
    assert since(rows) == ([0, 36], [0, 18])
    rows.remove_last(20)
    append(rows, 1)
    assert since(rows)[0] == [0, 0]


def test_dropped_where_someone_wrote_a_key(rows):
    rows.keys[0, :, 3] = 1.0
    assert since(rows)[0] == [0, 0]


def test_a_new_request_has_none(rows):
    rows.clear()
    append(rows, 50)
    assert since(rows)[0] == [0, 0]


def test_lists_go_with_their_rows(rows):
    rows.select_batch(torch.tensor([1, 1, 0]))
    assert rows.state(KIND.name)["indices"][:, 0, 0].tolist() == [1, 1, 0]
    append(rows, 60)  # larger buffers
    assert rows.state(KIND.name)["indices"].shape[2] > 32
    assert since(rows) == ([36] * 3, [18] * 3)
    assert rows.state(KIND.name)["indices"][:, 0, 1].tolist() == [3, 3, 2]
