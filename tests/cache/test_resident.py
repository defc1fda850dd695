"""Rows in host memory with a pool on the device: what steps read, what is moved, and what is left when something fails."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tsa_compile.cache import host_pages, resident, resident_pages, storage
from tsa_compile.cache.fixed import pinned
from tsa_compile.cache.lease import Lease
from tsa_compile.cache.lookahead_index import LookaheadIndex
from tsa_compile.cache.storage import Pool
from tsa_compile.kernels.types import Rotation
from tsa_compile.policies.resident import Resident

pytest.importorskip("transformers")
BATCH, HEADS, KV_HEADS, DIM, V_DIM, LAYERS = 2, 4, 2, 4, 3, 2
PAGE_BYTES = 16 * KV_HEADS * (DIM + V_DIM) * 4
PROMPT = 500  # 31 pages and 4 rows; the pools below have 8 to 16 slots


class Run:
    """The layers of a cache, driven as a session drives them, and beside them every row in plain tensors."""

    def __init__(self, rule: Resident, padding: int = 0, indexes: tuple[tuple[int, LookaheadIndex], ...] = ()) -> None:
        from tsa_compile.cache.hf_layers import layer_types

        self.lease, make = Lease(Pool(keep=0)), layer_types().that_keep(rule.keeping()._replace(indexes=indexes))
        self.layers = [make(lease=self.lease) for _ in range(LAYERS)]
        self.resident = self.layers[0].resident
        self.keys = [torch.empty(BATCH, KV_HEADS, 0, DIM) for _ in range(LAYERS)]
        self.values = [torch.empty(BATCH, KV_HEADS, 0, V_DIM) for _ in range(LAYERS)]
        self.padding = padding

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    def mask(self, rows: int) -> torch.Tensor:
        mask = torch.ones(BATCH, rows, dtype=torch.int64)
        mask[1, : self.padding] = 0
        return mask

    def new(self, n: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of layer `n`, put into the plain tensors."""
        keys, values = torch.randn(BATCH, KV_HEADS, rows, DIM) * 2, torch.randn(BATCH, KV_HEADS, rows, V_DIM)
        self.keys[n], self.values[n] = torch.cat([self.keys[n], keys], 2), torch.cat([self.values[n], values], 2)
        return keys, values

    def prompt(self, rows: int) -> None:
        self.lease.key_mask = self.mask(self.length + rows).bool()
        for n, layer in enumerate(self.layers):
            seen = layer.update(*self.new(n, rows))
            assert torch.equal(seen[0], self.keys[n])
            assert torch.equal(seen[1], self.values[n])

    def crop(self, rows: int) -> None:
        for n, layer in enumerate(self.layers):
            layer.crop(-rows)
            self.keys[n], self.values[n] = (x[:, :, : max(0, x.shape[2] - rows)] for x in (self.keys[n], self.values[n]))

    def step(self) -> bool:
        """One token; every layer's attention is what its resident rows, or all rows, give. Returns whether it read all."""
        mask = self.mask(self.length + 1)
        self.lease.key_mask = mask.bool()
        for layer in self.layers:
            layer.settle()
        with self.layers[0].around_step(self.layers) as anew, pinned(self.layers, {"attention_mask": mask}, 1) as fixed:
            self.check()
            whole = anew and (self.resident.rule.strict or self.resident.counts.steps == self.first_step)
            for n, layer in enumerate(self.layers):
                pools, shown = layer.update(*self.new(n, 1)), fixed["attention_mask"].bool()
                q = torch.randn(BATCH, HEADS, 1, DIM)
                bounds = torch.ops.tsa.padding_range(shown)
                out, _ = torch.ops.tsa.resident_attention(q, *pools, *bounds, shown, 0.7)
                seen = mask.bool() & (torch.ones_like(mask).bool() if whole else self.here())
                expected = attention(q, self.keys[n], self.values[n], seen)
                torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
        for layer in self.layers:
            layer.advance(1)
        return whole

    first_step = 1

    def forget(self) -> None:
        """What a step has put into the plain tensors before it failed."""
        self.keys, self.values = ([x[:, :, : self.layers[0].total] for x in full] for full in (self.keys, self.values))

    def here(self) -> torch.Tensor:
        """bool `[B, rows]`: in the pools, the new row included."""
        rows = torch.arange(self.length) // 16
        found = [torch.isin(rows, torch.tensor([*places, self.layers[0].total // 16])) for places in self.resident.slots]
        return torch.stack(found)

    def check(self) -> None:
        """The host has every whole page; slots hold what the table says, once each; first and last pages are there."""
        rule, whole = self.resident.rule, self.length // 16
        for n, layer in enumerate(self.layers):
            assert (layer.count(), layer.host.pages) == (self.length, whole)
            for rows, full in zip(layer.host.whole(torch.device("cpu")), (self.keys[n], self.values[n]), strict=True):
                assert torch.equal(rows, full[:, :, : whole * 16])
            for b, places in enumerate(self.resident.slots):
                for page, slot in places.items():
                    at = slice(page * 16, page * 16 + 16)
                    assert torch.equal(layer.buffers.keys[b, :, slot * 16 : slot * 16 + 16], self.keys[n][b, :, at])
                    assert torch.equal(layer.buffers.values[b, :, slot * 16 : slot * 16 + 16], self.values[n][b, :, at])
        for b, places in enumerate(self.resident.slots):
            assert len({*places.values(), 0}) == len(places) + 1
            first = (self.padding if b else 0) // 16
            last = (self.length - 1) // 16
            if not self.resident._arriving:
                forced = {*range(first, first + rule.sinks), *range(max(first, last - rule.recent + 1), last + 1)}
                assert {p for p in forced if p < whole} <= set(places)


def attention(q, k, v, seen):
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    logits = (q.double() @ k.transpose(-1, -2) * 0.7).masked_fill(~seen[:, None, None], -torch.inf)
    return torch.softmax(logits, -1) @ v


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST", 128)
    monkeypatch.setattr(storage, "CHUNK", 128)


actions = st.lists(
    st.tuples(st.just("steps"), st.integers(1, 40)) | st.tuples(st.just("prompt"), st.integers(1, 90))
    | st.tuples(st.just("crop"), st.integers(0, 60)), min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(
    actions,
    st.sampled_from([{"pages": 6}, {"keep": 0.2}]),
    st.sampled_from([1, 5, 16, 20]),
    st.booleans(),
    st.sampled_from([0, 170]),
)
@example([("steps", 5)], {"keep": 0.2}, 5, True, 170)
def test_steps_read_what_is_resident_or_everything(acts, share, interval, strict, padding):
    """Batch rows with other numbers of pages, and the rest in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "FIRST", 128)
        patch.setattr(storage, "CHUNK", 128)
        patch.setattr(resident_pages, "AT_ONCE", 7)
        run = Run(Resident(**share, interval=interval, strict=strict, sinks=1, recent=2), padding)
        run.prompt(PROMPT)
        for action, number in [("steps", 3), *acts, ("steps", 3)]:
            run.first_step = run.resident.counts.steps + 1  # a step after something else reads everything
            if action == "prompt":
                run.prompt(number)
            elif action == "crop":
                run.crop(number)
            else:
                if run.resident.known:
                    run.first_step = -1
                for _ in range(number):
                    run.step()
                    run.first_step = -1
        assert run.layers[0].length < run.length  # rows of the pool, and of the sequence


def test_pages_move_between_choices_alone_and_are_counted():
    run = Run(Resident(pages=6, interval=20, sinks=1, recent=2))
    run.prompt(PROMPT)
    counts = run.resident.counts
    assert counts.to_host == LAYERS * BATCH * 31 * PAGE_BYTES
    run.step()
    first = LAYERS * BATCH * PAGE_BYTES * (5 + 26)  # 6 pages with the open one, which is there; then the others, once
    assert counts.to_device == first
    moved = []
    for _ in range(60):
        before, fetched, choices = counts.to_device, counts.pages_fetched, counts.refreshes
        run.step()
        assert counts.to_device - before == (counts.pages_fetched - fetched) * PAGE_BYTES
        if counts.refreshes == choices:
            assert counts.to_device == before
        else:
            moved.append(counts.pages_fetched - fetched)
    assert len(moved) == 3  # by the first step's queries, by the 21st's and the 41st's
    assert 0 < sum(moved) <= 3 * LAYERS * BATCH * 6
    assert counts.to_host == LAYERS * BATCH * PAGE_BYTES * (run.length // 16)
    assert counts.steps == 61


def test_the_choice_is_the_heaviest_pages():
    """Keys of one page look at every query; it is found wherever it lies."""
    run = Run(Resident(pages=6, interval=4, recent=2))
    run.prompt(PROMPT)
    run.step()
    for n, layer in enumerate(run.layers):
        layer.sums[:, :, 17] = 50.0
        run.resident._queries[n] = resident.Asked(torch.ones(BATCH, HEADS, 1, DIM), 0.7, torch.zeros(1, 1))
    assert not all(17 in places for places in run.resident.slots)
    run.step()
    assert all(17 in places for places in run.resident.slots)


@pytest.mark.parametrize(("ensemble", "page"), [("max", 12), ("mean", 17)])
def test_layers_are_joined_by_the_largest_share_or_the_mean(monkeypatch, ensemble, page):
    run = Run(Resident(pages=4, interval=4, recent=2, ensemble=ensemble, layers=(0, 1)))
    run.prompt(PROMPT)
    run.step()
    for n, layer in enumerate(run.layers):
        shares = torch.zeros(BATCH, 31, dtype=torch.float64)
        shares[:, 12], shares[:, 17] = (0.6, 0.0)[n], 0.35
        monkeypatch.setattr(layer, "page_scores", lambda asked, index, shares=shares: shares)
    run.step()
    assert [sorted(places) for places in run.resident.slots] == [
        [0, page, 30]
    ] * 2  # the sink, the choice, the last; the open one


def random_index(seed: int) -> LookaheadIndex:
    g = torch.Generator().manual_seed(seed)
    down, up, weight = (torch.randn(shape, generator=g) for shape in ((5, HEADS * DIM), (6, DIM, 5), (6, HEADS * DIM)))
    return LookaheadIndex(KV_HEADS, down, up, weight, torch.tensor(0.1), Rotation((0.3, 0.01), False, 1.25))


def predicted(index: LookaheadIndex, q: torch.Tensor, position: int, keys: torch.Tensor) -> float:
    """The score of one page, by the formula: q `[H, D]`, real keys of the page `[Hk, n, D]`; float64, heads one by one."""

    def turned(x: torch.Tensor, sign: int) -> torch.Tensor:
        angle = sign * position * index.frequencies.double()
        size = 1.25**sign
        first, second = x[..., :2], x[..., 2:]
        cos, sin = angle.cos() * size, angle.sin() * size
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    norm = lambda x: x / (x.square().mean() + 1e-7).sqrt()  # noqa: E731
    x = norm(turned(q.double(), -1).flatten())
    code, total = norm(index.down.double() @ x), index.offset.double()
    for h in range(6):
        asked, mean = turned(index.up[h].double() @ code, 1), keys[h // 3].double().mean(0)
        total = total + (index.weight[h].double() @ x) * 24**-0.5 * torch.relu(asked @ mean)
    return float(total.sigmoid())


@pytest.mark.parametrize("budget", [{}, {"pages": 7}])
@pytest.mark.parametrize("told", [False, True])
def test_a_learned_index_makes_pages_resident_above_its_threshold(budget, told):
    """And no more than the budget; positions are those of the call, or the rows before; padding is not scored."""
    indexes = tuple((n, random_index(n)) for n in range(LAYERS))
    run = Run(Resident(**budget, index="learned", threshold=0.7, interval=30, recent=2), 170, indexes)
    run.prompt(2 * PROMPT)
    run.lease.positions = torch.tensor([[700], [330]]) if told else None
    run.step()
    before = run.layers[0].host.pages
    asked = dict(run.resident._queries)
    run.step()
    for b, (first, position) in enumerate(zip((0, 170), (700, 330) if told else (1000, 1000), strict=True)):
        scores = {}
        for page in range(first // 16 + 1, before - 1):  # the first page of the row is a sink, the last one is recent
            own = [run.keys[n][b, :, page * 16 : page * 16 + 16] for n in range(LAYERS)]
            by_layer = [predicted(indexes[n][1], asked[n].q[b, :, 0], position, own[n]) for n in range(LAYERS)]
            scores[page] = max(by_layer)
        hits = sorted((p for p in scores if scores[p] > 0.7), key=lambda p: -scores[p])
        assert 4 < len(hits) < len(scores)
        most = 7 - 3 if budget else len(hits)  # beside the first, the last and the open page
        assert {*run.resident.slots[b]} == {first // 16, before - 1, *hits[:most]}
    assert run.layers[0].length < run.length


def test_the_lost_mass_is_what_lies_outside():
    run = Run(Resident(pages=6, interval=100, recent=2, sample=1))
    run.prompt(PROMPT)
    seen = []
    exact = torch.ops.tsa.decode_attention
    for _ in range(3):
        before = run.resident.counts.lost
        run.step()
        seen.append(run.resident.counts.lost - before)
    assert run.resident.counts.sampled == 3 * LAYERS
    assert exact is torch.ops.tsa.decode_attention
    q, layer = torch.randn(BATCH, HEADS, 1, DIM), run.layers[0]
    here = run.here()
    part = exact(q, run.keys[0], run.values[0], None, 1, None, None, here, 0.7, causal=False)[:2]
    run.resident.counts.lost = 0.0
    with run.resident.around_step(run.layers):
        out, lse = torch.ops.tsa.resident_attention(
            q, *layer.buffers[:2], None, None, layer.own_mask(run.mask(run.length), 0).bool(), 0.7
        )
    whole = exact(q, run.keys[0], run.values[0], None, 1, None, None, None, 0.7, causal=False)[1]
    torch.testing.assert_close(out, part[0], rtol=1e-5, atol=1e-6)
    assert run.resident.counts.lost == pytest.approx(float((1 - (lse - whole).exp()).mean()), abs=1e-5)
    assert 0.1 < run.resident.counts.lost_mass < 1


def test_pages_on_their_way_are_not_seen(monkeypatch):
    """A slow copy: steps go on with what there is, and see the pages once they have come."""
    polls = [0]

    @contextlib.contextmanager
    def slow(device):
        started = polls[0]
        yield lambda: polls[0] >= started + 3

    run = Run(Resident(pages=6, interval=50, recent=2))
    run.prompt(PROMPT)
    monkeypatch.setattr(resident, "copying", slow)
    held = []
    for _ in range(8):
        polls[0] += 1
        run.step()
        held.append(len(run.resident.slots[0]))
    assert held[0] == 0
    assert max(held) >= 5
    assert not run.resident._arriving


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failing_copy_leaves_the_cache_right(monkeypatch, call, strict):
    """At the first choice and at a later one, in the first layer and in the second, before a step and within it."""
    run = Run(Resident(pages=6, interval=3, recent=2, strict=strict))
    run.prompt(PROMPT)
    copy, calls = resident_pages.ResidentPages._copy, [0]

    def failing(self, keys, values, moves):
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError("CUDA error: the bus has fallen off")
        return copy(self, keys, values, moves)

    for _ in range(2):
        calls[0] = 0
        monkeypatch.setattr(resident_pages.ResidentPages, "_copy", failing)
        failed = 0
        for _ in range(8):
            try:
                run.first_step = -1 if run.resident.known else run.resident.counts.steps + 1
                run.step()
            except RuntimeError as error:
                assert "the bus has fallen off" in str(error)  # noqa: PT017 - which of the steps fails depends on the call
                failed += 1
                run.forget()
        assert failed == 1
        monkeypatch.setattr(resident_pages.ResidentPages, "_copy", copy)


def test_a_host_without_memory_is_an_error_and_the_rows_wait(monkeypatch):
    run = Run(Resident(pages=6, interval=3, recent=2, strict=True))
    run.prompt(PROMPT)
    available = host_pages.available_memory
    monkeypatch.setattr(host_pages, "available_memory", lambda: 1000)
    with pytest.raises(
        host_pages.HostMemoryError, match=r"GiB of host memory for 11 more pages of a layer, batch 2: 0.000 GiB are free"
    ):
        run.layers[0].append(*(x[:, :, :700] for x in run.new(0, 700)))
    assert [layer.count() for layer in run.layers] == [PROMPT] * 2
    run.keys[0], run.values[0] = run.keys[0][:, :, :PROMPT], run.values[0][:, :, :PROMPT]
    for _ in range(3):
        run.step()
    monkeypatch.setattr(host_pages, "available_memory", available)
    late = run.new(0, 700), run.new(1, 700)
    for layer, rows in zip(run.layers, late, strict=True):
        layer._late = rows  # as a traced graph leaves them
    monkeypatch.setattr(host_pages, "available_memory", lambda: 1000)
    with pytest.raises(host_pages.HostMemoryError):
        run.layers[0].settle()
    assert [layer.count() for layer in run.layers] == [run.length] * 2
    monkeypatch.setattr(host_pages, "available_memory", available)
    run.first_step = run.resident.counts.steps + 1
    run.step()


def test_pages_lie_in_segments_that_stay_where_they_are():
    """Each of as many pages as a power of two of bytes holds, but for the last, which has room for more."""
    pages, made = host_pages.HostPages(torch.empty(3, 2, 0, 4), torch.empty(3, 2, 0, 4)), torch.randn(3, 700, 2, 16, 4)
    real, begin = torch.rand(3, 700, 16) < 0.9, 0
    for number in (300, 1, 100, 299):
        before = [segment.keys.data_ptr() for segment in pages.segments]
        written = made[:, begin : begin + number]
        pages.write(begin, written, -written, real[:, begin : begin + number])
        begin += number
        assert [segment.keys.data_ptr() for segment in pages.segments][: len(before)] == before
    each = 3 * 2 * 16 * 4 * 4
    sizes = [segment.keys.shape[1] for segment in pages.segments]
    assert sum(sizes) >= 700
    assert all(size == 64 or size in [(1 << n) // each for n in range(32)] for size in sizes)
    keys, values = pages.whole(torch.device("cpu"))
    assert torch.equal(keys, made.transpose(1, 2).flatten(2, 3))
    assert torch.equal(values, -keys)
    assert torch.equal(pages.real, real)
    assert torch.equal(pages.page(650)[0], made[:, 650])
    pages.write(290, made[:, :20], made[:, :20], real[:, :20])
    assert pages.pages == 310
    assert torch.equal(pages.whole(torch.device("cpu"))[0].unflatten(2, (-1, 16))[:, :, 290:].transpose(1, 2), made[:, :20])


def test_a_layer_that_is_not_there_is_named():
    run = Run(Resident(pages=6, layers=(0, 2)))
    run.prompt(40)
    with pytest.raises(ValueError, match=r"Resident.layers: \(0, 2\), but the cache has 2 layers"):
        run.step()


def test_keys_that_are_no_pool_are_an_error():
    run = Run(Resident(pages=6))
    run.prompt(40)
    q, other = torch.randn(BATCH, HEADS, 1, DIM), torch.randn(BATCH, KV_HEADS, 16, DIM)
    with run.resident.around_step(run.layers), pytest.raises(RuntimeError, match="keys that are not a pool of the cache"):
        torch.ops.tsa.resident_attention(q, other, other, None, None, None, 0.7)


def test_what_is_not_built_says_so():
    run = Run(Resident(pages=6))
    run.prompt(40)
    for attempt in (lambda layer: setattr(layer, "keys", torch.ones(1)), lambda layer: layer.__deepcopy__({})):
        with pytest.raises(NotImplementedError, match="whose rows lie in host memory takes no"):
            attempt(run.layers[0])


def test_rows_of_the_batch_can_be_chosen_and_given_back_whole():
    run = Run(Resident(pages=6, recent=2, strict=True))
    run.prompt(PROMPT)
    run.step()
    for n, layer in enumerate(run.layers):
        layer.reorder_cache(torch.tensor([1, 1]))
        run.keys[n], run.values[n] = run.keys[n][[1, 1]], run.values[n][[1, 1]]
    run.step()
    plain = run.layers[1].as_plain()
    assert torch.equal(plain.keys, run.keys[1])
    assert torch.equal(plain.values, run.values[1])
