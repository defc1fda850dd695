"""Teams of keys: who they are, how they are drawn, and attention to those that are; Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_decode import DEVICE, int32, poisoned, qkv
from tests.kernels.test_sampled_values import _poisoned, check, exact, seed  # noqa: F401 - the fixture
from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.decode.reference import decode_attention_reference
from tsa_compile.kernels.attend.sampled.teams import gumbel, key_biases, team_attention_reference, team_biases
from tsa_compile.kernels.common.teams import pack, teams_of, unpack
from tsa_compile.kernels.state.append_teams.reference import append_teams_reference, page_teams_reference

pytest.importorskip("triton")
from tsa_compile.kernels.attend.sampled import teams_device
from tsa_compile.kernels.attend.sampled.teams_host import team_attention
from tsa_compile.kernels.state.append_teams.host import append_teams, page_teams

slow = pytest.mark.slow


# ---- teams of a page


def by_hand(keys, real, count):
    """(team of each row, representatives) of one page, by loops."""
    rows = [r for r in range(16) if real[r]]
    distance = lambda a, b: float((keys[a] - keys[b]).square().sum())  # noqa: E731
    mean = keys[rows].mean(0)
    chosen = [min(rows, key=lambda r: float((keys[r] - mean).square().sum()))]
    while len(chosen) < count:
        near = {r: min(distance(r, c) for c in chosen) for r in rows}
        farthest = max(rows, key=near.__getitem__)
        if near[farthest] == 0:
            break
        chosen.append(farthest)
    return {r: min(range(len(chosen)), key=lambda s: distance(r, chosen[s])) for r in rows}, chosen


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("rows", [16, 9, 2, 1])
def test_teams_are_those_of_farthest_points(rows, count):
    keys = torch.randn(16, 5, dtype=torch.float64)
    real = torch.zeros(16, dtype=torch.bool)
    real[torch.randperm(16)[:rows]] = True
    team, representatives, number = unpack(teams_of(torch.where(real[:, None], keys, 0), real, count))
    want, chosen = by_hand(keys, real, count)
    assert {r: int(team[r]) for r in want} == want
    assert representatives[: len(chosen)].tolist() == chosen
    assert int(number) == len(chosen) == min(rows, count)


def test_equal_keys_make_one_team_and_padding_none():
    same = torch.ones(2, 16, 3)
    real = torch.tensor([[True] * 16, [False] * 16])
    bits = teams_of(torch.where(real[..., None], same, 0), real, 4)
    assert unpack(bits)[2].tolist() == [1, 0]
    assert bits[1] == 0
    team, chosen, number = torch.randint(4, (7, 16)), torch.randint(16, (7, 4)), torch.randint(5, (7,))
    assert all(torch.equal(a, b) for a, b in zip(unpack(pack(team, chosen, number)), (team, chosen, number), strict=True))


@pytest.mark.parametrize("count", [4, pytest.param(2, marks=slow)])
def test_triton_makes_the_same_teams(count):
    k = qkv(capacity=40)[1]
    hidden = torch.rand(2, 40, device=DEVICE) < 0.7
    for given in ((int32(3, 20), int32(33, 19), None), (None, None, hidden), (int32(30, 0), int32(5, 0), hidden)):
        got = page_teams(k, None, 1, *given, count)
        want = page_teams_reference(*(x if x is None else x.cpu() for x in (k, None)), 1, *_on_cpu(given), count)
        ends = [40, 40] if given[1] is None else [int(s + n) for s, n in zip(given[0], given[1], strict=True)]
        for b, end in enumerate(ends):
            assert torch.equal(got[b, :, : end // 16].cpu(), want[b, :, : end // 16])


def _on_cpu(given):
    return [x if x is None else x.cpu() for x in given]


@pytest.mark.parametrize("append", [append_teams_reference, append_teams], ids=["reference", "triton"])
def test_rows_that_come_one_by_one_make_the_teams_of_all_at_once(append):
    k = qkv(capacity=48, heads=2, kv_heads=1)[1]
    teams = torch.full((2, 1, 3), -1, dtype=torch.int64, device=DEVICE)
    at = [0, 0]
    for new in (15, 1, 20):
        before, at = at, [at[0] + new, at[1] + min(new, 13)]
        seen = poisoned(k, int32(0, 0), int32(*at))  # no row from the end on is read
        append(teams, seen, None, 1, None, int32(*before), int32(*at), None, 20, 4)
    want = page_teams_reference(k.cpu(), None, 1, None, None, None, 4)
    assert torch.equal(teams[0, 0, :2].cpu(), want[0, 0, :2])
    assert torch.equal(teams[1, 0, :1].cpu(), want[1, 0, :1])
    assert (teams[1, 0, 1:] == -1).all()


def test_blocks_of_a_pool():
    pool = qkv(capacity=32, batch=5, heads=2, kv_heads=1)[1]
    table = torch.tensor([[3, 0], [4, 1]], dtype=torch.int32, device=DEVICE)
    got, want = (make(pool, table, 32, None, int32(64, 40), None, 4) for make in (page_teams, page_teams_reference))
    for entry, pages in ((3, 2), (0, 2), (4, 2)):
        assert torch.equal(got[entry, :, :pages], want[entry, :, :pages])


# ---- draws


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_a_team_weighs_one_on_average_whatever_the_others_draw(draws):
    """Exactly: the weight of a team that is read, times its chance to be read given the noise of the others, is 1."""
    phi, noise = torch.randn(50, 6, dtype=torch.float64) * 2, gumbel(torch.randint(2**32, (50, 6))).double()
    for g in range(6):
        others = torch.cat([(phi + noise)[:, :g], (phi + noise)[:, g + 1 :]], 1)
        tau = others.topk(draws).values[:, -1]
        chance = -torch.expm1(-torch.exp(phi[:, g] - tau))
        noise_in = noise.clone()
        noise_in[:, g] = 1e3  # read for certain
        weight = torch.exp(team_biases(phi, noise_in, draws)[:, g])
        torch.testing.assert_close(weight * chance, torch.ones(50, dtype=torch.float64), rtol=1e-12, atol=0)
        noise_in[:, g] = -1e3
        assert (team_biases(phi, noise_in, draws)[:, g] == -torch.inf).all()
    assert (team_biases(phi, noise, 6) == 0).all()
    assert ((team_biases(phi, noise, draws) > -torch.inf).sum(1) == draws).all()


def test_noise_is_of_the_gumbel_distribution():
    x = gumbel(torch.arange(0, 2**32, 2**12))  # its quantiles
    want = -torch.log(-torch.log1p(-(torch.arange(0, 2**32, 2**12).double() + 0.5) / 2**32))
    torch.testing.assert_close(x.double(), want, rtol=1e-4, atol=1e-4)
    assert gumbel(torch.tensor([0, 2**32 - 1])).isfinite().all()


def test_sums_over_keys_are_right_on_average():
    """Numerator and denominator within four standard errors of 2,400 draws, of 512 keys and 24 teams read of 124."""
    g = torch.Generator().manual_seed(3)
    k, heads, seeds = torch.randn(1, 1, 512, 8, generator=g), 4, 600
    values = torch.randn(512, 3, generator=g, dtype=torch.float64)
    q = torch.randn(8, generator=g)
    logits = (k[0, 0] @ q).expand(seeds, heads, -1)
    bits = page_teams_reference(k, None, 1, None, None, None, 4).expand(seeds, heads, -1)
    first, end = torch.zeros(seeds, dtype=torch.long), torch.full((seeds,), 512)
    biases = key_biases(logits, bits, first, end, torch.arange(seeds) * 977, 24, 1)
    weights = torch.exp(logits + biases).double().flatten(0, 1)
    mass = torch.exp(logits[0, 0]).double()
    for got, want in ((weights.sum(1, keepdim=True), mass.sum()), (weights @ values, mass @ values)):
        assert ((got.mean(0) - want).abs() <= 4 * got.std(0) / len(got) ** 0.5).all()
        assert (got.std(0) > 1e-3 * want.abs()).all()
    read = (biases > -torch.inf).sum(-1).double().mean()
    assert 24 * 3 < read < 24 * 8  # teams of about 4 keys


# ---- attention


def both(x, *view, draws=6, recent=1, seeds=None, key_mask=None, sinks=None, scale=0.5):
    """(by Triton, by the reference in float64), each (out, lse)."""
    q, k, v = x
    teams = page_teams_reference(k.cpu().float(), *exact_all(view), exact(key_mask), 4)
    given = (*view, key_mask, scale, seed() if seeds is None else seeds, draws, recent, sinks)
    got = team_attention(q, k, v, teams.to(DEVICE), *given)
    want = team_attention_reference(*map(exact, (q, k, v)), teams, *exact_all(given))
    return got, [x.to(DEVICE) for x in want]


def exact_all(given):
    return [exact(x) for x in given]


@pytest.mark.parametrize(
    ("shape", "draws"),
    [
        (dict(capacity=200), 6),
        (dict(capacity=130, heads=3, kv_heads=1, dim=24, v_dim=40), 9),
        pytest.param(dict(capacity=100, heads=5, kv_heads=5, batch=1), 1, marks=slow),
        pytest.param(dict(capacity=320, heads=20, kv_heads=1, batch=1), 3, marks=slow),
    ],
    ids=["plain", "odd sizes", "no groups", "many heads"],
)
def test_triton_draws_what_the_reference_draws(shape, draws):
    x = qkv(**shape)
    lengths = int32(*(shape["capacity"] - 13 * b for b in range(len(x[0]))))
    check(*both(x, None, 1, None, lengths, draws=draws))


@pytest.mark.parametrize("draws", [1, 255, 1500, 4096])
@pytest.mark.parametrize("largest", [40, 1 << 30], ids=["many that are equal", "large"])
def test_the_largest_ranks_are_found_among_more_than_are_read_at_once(draws, largest):
    pages, recent = 1300, 2
    slots = pages * 4
    ranks = torch.randint(-largest, largest, (2, slots)).clamp(min=0).int()
    ranks[1, 3500:] = 0
    cuts, counts, listed = (torch.full(shape, -7, dtype=torch.int32, device=DEVICE) for shape in ((2,), (2,), (2, draws)))
    tensors = (ranks.to(DEVICE), torch.empty(2, slots, dtype=torch.int32, device=DEVICE), cuts, listed, counts, None, None)
    teams_device.team_cut_kernel[(2,)](*tensors, 2, pages * 16, slots, recent, draws, num_warps=16)
    for row, cut, count, found in zip(ranks[:, : slots - 4 * recent], cuts.tolist(), counts.tolist(), listed.cpu(), strict=True):
        assert cut == int(row.sort(descending=True).values[draws])  # 0 without more
        assert found[:count].tolist() == (row > cut).nonzero().flatten().tolist()
        assert (found[count:] == -7).all()


def test_padding_masks_and_sinks():
    q, k, v = qkv(capacity=150)
    start, lengths = int32(37, 0), int32(110, 131)
    x = q, poisoned(k, start, lengths), poisoned(v, start, lengths)
    check(*both((q, k, v), None, 1, start, lengths, sinks=torch.randn(4, device=DEVICE)))
    check(*both((q, k, v), None, 1, None, None, key_mask=torch.rand(2, 150, device=DEVICE) < 0.6, recent=3))
    teams = page_teams_reference(k.cpu(), None, 1, start.cpu(), lengths.cpu(), None, 4).to(DEVICE)
    out = team_attention(*x, teams, None, 1, start, lengths, None, 0.5, seed(), 6, 1)[0]
    assert not out.isnan().any()


def test_blocks_and_strides():
    q, k, v = qkv(capacity=320, batch=1)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    table = torch.randperm(20)[:15][None].int().to(DEVICE)
    check(*both((q, k, v), table, 16, None, int32(229)))


@pytest.mark.parametrize("triton_runs", [False, True], ids=["reference", "triton"])
def test_as_many_draws_as_teams_are_exact(triton_runs):
    q, k, v = qkv(capacity=150)
    start, lengths = int32(30, 5), int32(64, 90)
    q, k, v = (x if triton_runs else x.double() for x in (q, k, v))
    teams = page_teams_reference(k.cpu(), None, 1, start.cpu(), lengths.cpu(), None, 4).to(DEVICE)
    operator = team_attention if triton_runs else team_attention_reference
    got = operator(q, k, v, teams, None, 1, start, lengths, None, 0.5, seed(), 24, 1)
    want = decode_attention_reference(q.double(), k.double(), v.double(), None, 1, start, lengths, None, 0.5)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6 if triton_runs else 1e-12)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_what_no_head_of_the_group_reads_is_not_read():
    q, k, v = qkv(capacity=200, batch=1)
    teams = page_teams_reference(k.cpu(), None, 1, None, None, None, 4)
    logits = decode_attention_reference(q, k, v, None, 1, None, None, None, 0.5, scores=True)[2][:, :, 0].cpu()
    ends = torch.tensor([0]), torch.tensor([200])
    biases = key_biases(logits, teams.repeat_interleave(2, 1), *ends, seed().cpu(), 6, 1)
    read = (biases > -torch.inf).unflatten(1, (2, 2)).any(2).to(DEVICE)
    assert 20 < read.sum() < 0.6 * read.numel()
    run = lambda k, v: team_attention(q, k, v, teams.to(DEVICE), None, 1, None, None, None, 0.5, seed(), 6, 1)[0]  # noqa: E731
    want = run(k, v)
    torch.testing.assert_close(run(k, torch.where(read[..., None], v, torch.nan)), want)
    representatives = unpack(teams.to(DEVICE))[1]
    scored = torch.zeros(1, 2, 13, 16, dtype=torch.bool, device=DEVICE).scatter(3, representatives, True).flatten(2)[..., :200]
    torch.testing.assert_close(run(torch.where((read | scored)[..., None], k, torch.nan), v), want)


def test_a_row_without_keys_is_zero_and_an_empty_batch_works():
    got, want = both(qkv(capacity=100), None, 1, None, int32(0, 100))
    assert (got[0][0] == 0).all()
    assert (got[1][0] == -torch.inf).all()
    check(got, want)
    q, k, v = (x[:0] for x in qkv(device="cpu"))
    teams = torch.zeros(0, k.shape[1], 9, dtype=torch.int64)
    assert torch.ops.tsa.team_attention(q, k, v, teams, None, 1, None, None, None, 0.5, seed().cpu(), 4, 1)[0].shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(draws=0), "draws must be 1 to 4096 and recent at least 1, got 0"),
        (dict(recent=0), "recent at least 1, got 4 and 0"),
        (dict(teams=torch.zeros(2, 2, 1, dtype=torch.int64)), r"teams must be int64 \(2, 2, 2\)"),
        (dict(teams=torch.zeros(2, 2, 2)), "teams must be int64"),
        (dict(seeds=torch.zeros(1)), "seed must be int64"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    call = dict(teams=torch.zeros(2, 2, 2, dtype=torch.int64), seeds=torch.zeros(1, dtype=torch.long), draws=4, recent=1) | change
    x = qkv(capacity=32, device="cpu")
    given = (None, 1, None, None, None, 0.5, call["seeds"], call["draws"], call["recent"])
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.team_attention(*x, call["teams"], *given)
    with pytest.raises(ValueError, match="count must be 1 to 4, got 5"):
        torch.ops.tsa.page_teams(x[1], None, 1, None, None, None, 5)


def test_the_fakes_are_what_the_operators_give():
    q, k, v = qkv(capacity=100, v_dim=24, device="cpu")
    lengths, tests = int32(100, 50, device="cpu"), ("test_schema", "test_faketensor")
    teams = torch.ops.tsa.page_teams(k, None, 1, None, lengths, None, 4)
    given = (q, k, v, teams, None, 1, None, lengths, None, 0.5, seed().cpu(), 4, 1)
    torch.library.opcheck(torch.ops.tsa.team_attention.default, given, test_utils=tests)
    torch.library.opcheck(torch.ops.tsa.page_teams.default, (k, None, 1, None, None, None, 4), test_utils=("test_schema",))
    append = (teams, k, None, 1, None, lengths - 1, lengths, None, 1, 4)
    torch.library.opcheck(torch.ops.tsa.append_teams.default, append, test_utils=tests)
