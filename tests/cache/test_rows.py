"""Any sequence of appends, crops, reorderings, resets against a naive list of tensors; states against rebuilt ones."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.cache import storage
from tsa_compile.cache.kv_state import PAGE, Field, KvState
from tsa_compile.cache.lease import Lease
from tsa_compile.cache.page_sums import PageBases, PageSums, ValueSums
from tsa_compile.cache.rows import Rows
from tsa_compile.cache.storage import Pool
from tsa_compile.kernels.common.page_basis import HIDDEN, unpack

HEADS, DIM, V_DIM = 2, 4, 5


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
        self.rows = Rows(Lease(self.pool), (PageSums(), PageBases(), ValueSums(), Selection()))
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
        mask = self.mask if self.masked else None
        for name, rows in (("page_sums", self.keys), ("value_sums", self.values)):
            sums = self.rows.state(name)["sums"]
            for n, want in enumerate(page_sums(rows, mask)):
                torch.testing.assert_close(sums[n, :, : want.shape[1]], want)
        self.check_bases(mask)

    def check_bases(self, mask: torch.Tensor | None) -> None:
        """Eight directions are more than keys of four numbers have: what is left over is rounding."""
        kept = self.rows.state("page_bases")
        means = self.rows.state("page_sums")
        for n, keys in enumerate(self.keys):
            pages = keys.shape[1] // PAGE
            real = kept["coords"][n, :, :pages, 0] != HIDDEN
            want = torch.ones(keys.shape[1], dtype=torch.bool) if mask is None else mask[n, : keys.shape[1]]
            assert torch.equal(real, want[: pages * PAGE].unflatten(0, (pages, PAGE)).expand_as(real))
            numbers, coords = unpack(kept["basis"][n, :, :pages], torch.float32), kept["coords"][n, :, :pages].float()
            rest = torch.einsum("hprd,hpri,hpr->hpid", numbers, coords, kept["scales"][n, :, :pages].float())
            mean = means["sums"][n, :, :pages] / means["counts"][n, :, :pages, None].clamp_min(1)
            near = (rest + mean[:, :, None] - keys[:, : pages * PAGE].unflatten(1, (pages, PAGE)))[real]
            assert near.abs().max() < 0.05 if near.numel() else True


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
