"""Attention of a few query rows to a cache: reference against a literal float64 form, Triton against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.decode.reference import decode_attention_reference, page_attention_reference
from tsa_compile.kernels.common.view import rows_in_order
from tsa_compile.kernels.types import KvView

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}  # ||out - ref|| / ||ref||
bf16_on_gpu = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # Triton's interpreter multiplies bf16 wrongly


def int32(*values, device=DEVICE):
    return torch.tensor(values, dtype=torch.int32, device=device)


def qkv(rows=1, capacity=100, batch=2, heads=4, kv_heads=2, dim=16, v_dim=16, dtype=torch.float32, device=DEVICE):
    def make(h, n, d):
        return torch.randn(batch, h, n, d).to(device, dtype)

    return make(heads, rows, dim), make(kv_heads, capacity, dim), make(kv_heads, capacity, v_dim)


def poisoned(x, start, lengths):
    """x `[B, Hk, L, D]` with NaN wherever no key lies."""
    at = torch.arange(x.shape[2], device=x.device)
    there = (at >= start[:, None]) & (at < (start + lengths)[:, None])
    return x.masked_fill(~there[:, None, :, None], torch.nan)


def literal(q, k, v, first, end, scale, window=0, causal=True, softcap=0.0, bias=None, key_mask=None, sink=None):
    """One row of the batch, key by key in float64: out `[H, rows, Dv]`, lse `[H, rows]`."""
    heads, rows = q.shape[:2]
    out, lse = torch.zeros(heads, rows, v.shape[2], dtype=torch.float64), torch.full((heads, rows), -torch.inf).double()
    for h in range(heads):
        for r in range(rows):
            own, total, sums = end - rows + r, 0.0, torch.zeros(v.shape[2], dtype=torch.float64)
            for j in range(first, end):
                if (causal and j > own) or (window and j <= own - window) or (key_mask is not None and not key_mask[j]):
                    continue
                kv = h * k.shape[0] // heads
                s = float(q[h, r].double() @ k[kv, j].double()) * scale
                s = softcap * math.tanh(s / softcap) if softcap else s
                s += 0.0 if bias is None else float(bias[h, r, j])
                total += math.exp(s)
                sums += math.exp(s) * v[kv, j].double()
            total += 0.0 if sink is None else math.exp(float(sink[h]))
            if total:
                out[h, r], lse[h, r] = sums / total, math.log(total)
    return out, lse


VARIANTS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": (4,)},
    "numbers by head": {"mask": (1, 4, 3, 20)},
    "numbers by row of the batch": {"mask": (2, 1, 1, 20)},
    "key mask": {"key_mask": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_the_literal_form(variant):
    q, k, v = (x.double() for x in qkv(3, 20, v_dim=8, device="cpu"))
    start, lengths = int32(0, 4, device="cpu"), int32(20, 13, device="cpu")
    given = {n: torch.randn(x).double() if isinstance(x, tuple) else x for n, x in VARIANTS[variant].items()}
    key_mask = torch.rand(2, 20) < 0.6 if given.pop("key_mask", None) else None
    out, lse, _ = decode_attention_reference(q, k, v, None, 1, start, lengths, key_mask, 0.3, **given)
    bias, sinks = given.pop("mask", None), given.pop("sinks", None)
    for b, (first, n) in enumerate(((0, 20), (4, 13))):
        want = literal(
            q[b], k[b], v[b], first, first + n, 0.3, sink=sinks, **given,
            bias=None if bias is None else bias.expand(2, 4, 3, 20)[b], key_mask=None if key_mask is None else key_mask[b],
        )  # fmt: skip
        torch.testing.assert_close(out[b], want[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[b].double(), want[1], rtol=1e-6, atol=1e-6)


def test_a_row_that_sees_no_key_is_zero_and_bool_masks_hide():
    q, k, v = qkv(2, 20, device="cpu")
    lengths = int32(0, 1, device="cpu")  # of one key, the first of two rows sees none
    out, lse, _ = decode_attention_reference(q, k, v, None, 1, None, lengths, None, 0.3)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert (lse[1, :, 0] == -torch.inf).all()
    torch.testing.assert_close(out[1, :, 1], v[1, :, 0].repeat_interleave(2, 0))
    hidden = torch.rand(2, 1, 1, 20) < 0.5
    lowest = torch.where(hidden, torch.finfo(torch.float32).min, 0.0)
    for a, b in zip(
        *(decode_attention_reference(q, k, v, None, 1, None, None, None, 0.3, mask=m) for m in (~hidden, lowest)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("block", "pool"), [(4, True), (1, False), (20, False)])
def test_blocks_are_where_the_table_says(block, pool):
    """A pool `[blocks, Hk, block, D]`, or a cache `[B, Hk, L, D]` whose blocks are numbered through its rows."""
    x = torch.randn(10, 2, block, 3) if pool else torch.randn(2, 2, 20, 3)
    table = torch.randperm(40 // block if not pool else 10)[: 20 // block][None].int()
    by_position = rows_in_order(x, KvView(table, block, None, None))
    for j in range(20):
        entry, inside = int(table[0, j // block]), j % block
        n = x.shape[2] // block
        assert torch.equal(by_position[0, :, j], x[entry // n, :, entry % n * block + inside])


def test_page_attention_of_all_pages_is_decode_attention():
    q, k, v = qkv(2, 100, device="cpu")
    lengths = int32(100, 33, device="cpu")
    every = torch.arange(7, dtype=torch.int32).expand(2, 2, 7)
    counts = int32(7, 7, device="cpu")[:, None].expand(2, 2)
    got = page_attention_reference(q, k, v, every.flip(2), counts, None, 1, None, lengths, None, 0.3)
    want = decode_attention_reference(q, k, v, None, 1, None, lengths, None, 0.3)
    for a, b in zip(got, want[:2], strict=True):
        torch.testing.assert_close(a, b)


# ---- Triton, by its interpreter where there is no GPU


@pytest.fixture(scope="module")
def host():
    pytest.importorskip("triton")
    from tsa_compile.kernels.attend.decode import host

    return host


def assert_near(got, want, dtype):
    """Output and log-sum-exp; a row without keys has exactly 0 and -inf."""
    out, lse, expected, expected_lse = got[0].double(), got[1].double(), want[0].double(), want[1].double()
    assert not out.isnan().any()
    assert ((out - expected).norm() <= TOLERANCE[dtype] * expected.norm()).item()
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    assert (out[expected_lse == -torch.inf] == 0).all()
    torch.testing.assert_close(lse, expected_lse, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def both(host, q, k, v, *rest, splits=None, config=None, **given):
    """(by Triton, by the reference in float64)."""
    numbers = {n: x.double() if n in ("mask", "sinks") and x.is_floating_point() else x for n, x in given.items()}
    want = decode_attention_reference(*(x.double() for x in (q, k, v)), *rest, **numbers)
    if splits is None:
        return host.decode_attention(q, k, v, *rest, **given), want
    masks = (given.get("mask"), given.get("sinks"), given.get("softcap", 0.0), given.get("window", 0), given.get("causal", True))
    return host.launch(q, k, v, KvView(*rest[:4]), *rest[4:], masks, k.shape[2], None, None, config, splits), want


SHAPES = {  # rows, capacity, heads, kv_heads, dim, v_dim
    "1 row": (1, 100, 4, 4, 16, 16),
    "group 4": (1, 130, 8, 2, 64, 64),
    "group 6, odd dims": (2, 70, 12, 2, 40, 24),
    "group 7": (5, 65, 14, 2, 64, 16),
    "group 8, 16 rows": (16, 90, 8, 1, 16, 32),
    "head dim 256": (1, 33, 4, 2, 256, 256),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16_on_gpu])
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_lengths_and_poison_beyond_them(host, shape, dtype):
    rows, capacity, heads, kv_heads, dim, v_dim = SHAPES[shape]
    q, k, v = qkv(rows, capacity, 3, heads, kv_heads, dim, v_dim, dtype)
    start, lengths = int32(0, 3, 0), int32(capacity, capacity // 2 - 3, 1)
    k, v = (poisoned(x, start, lengths) for x in (k, v))
    assert_near(*both(host, q, k, v, None, 1, start, lengths, None, dim**-0.5), dtype)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("splits", [1, 3, 12])
def test_any_number_of_parts_and_both_orders_of_the_product(host, splits, swap):
    from tsa_compile.kernels.attend.decode.config import DecodeConfig

    q, k, v = qkv(3, 150, 3, 4, 2, 32, 16)
    start, lengths = int32(0, 0, 0), int32(0, 150, 17)
    k, v = (poisoned(x, start, lengths) for x in (k, v))
    config = DecodeConfig(16, 16, 4, 2, 2, swap)
    assert_near(*both(host, q, k, v, None, 1, None, lengths, None, 0.3, splits=splits, config=config), torch.float32)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "variant",
    [
        "bidirectional",
        "window",
        "softcap",
        "sinks",
        "by head",
        "by row",
        "half numbers",
        "bool",
        "key mask",
        "all hidden",
        "strides",
    ],
)
def test_masks_as_data(host, variant, rows):
    q, k, v = qkv(rows, 70, 2, 4, 2, 16, 16)
    lengths, key_mask, given = int32(70, 41), None, {}
    if variant == "bidirectional":
        given = {"causal": False}
    elif variant == "window":
        given = {"window": 20}
        k, v = (poisoned(x, lengths - rows - 19, int32(70, 41)) for x in (k, v))  # what lies before the window is not read
    elif variant == "softcap":
        given = {"softcap": 1.5}
    elif variant == "sinks":
        given, lengths = {"sinks": torch.randn(4, device=DEVICE)}, int32(70, 0)
    elif variant in ("by head", "by row", "half numbers"):
        shape = {"by head": (1, 4, 1, 70), "by row": (2, 1, rows, 70), "half numbers": (2, 4, rows, 70)}[variant]
        bias = torch.randn(shape, device=DEVICE)
        bias = torch.where(torch.rand(shape, device=DEVICE) < 0.2, torch.finfo(torch.float32).min, bias)
        given = {"mask": bias.half() if variant == "half numbers" else bias}
    elif variant == "bool":
        given = {"mask": torch.rand(2, 1, rows, 70, device=DEVICE) < 0.5}
    elif variant == "strides":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    else:
        key_mask = torch.rand(2, 70, device=DEVICE) < (0.6 if variant == "key mask" else 0.0)
    assert_near(*both(host, q, k, v, None, 1, None, lengths, key_mask, 0.3, **given), torch.float32)


@pytest.mark.parametrize("block", [1, 16, 64])
def test_keys_in_blocks(host, block):
    """A shuffled pool; the table's unused entries and the rows beyond the lengths are poison."""
    q, _, _ = qkv(2, 1, 2, 4, 2, 16, 16)
    per_row = 128 // block
    pool = [torch.randn(2 * per_row, 2, block, 16, device=DEVICE) for _ in range(2)]
    table = torch.randperm(2 * per_row, device=DEVICE).int().view(2, per_row)
    lengths = int32(128, 50)
    k, v = (poisoned(rows_in_order(x, KvView(table, block, None, None)), int32(0, 0), lengths) for x in pool)
    for x, y in zip(pool, (k, v), strict=True):
        x[table.flatten().long()] = y.unflatten(2, (per_row, block)).transpose(1, 2).flatten(0, 1)
    table[1, -(-50 // block) :] = 10**6
    got, want = both(host, q, *pool, table, block, None, lengths, None, 0.3)
    assert_near(got, want, torch.float32)
    dense = decode_attention_reference(*(x.double() for x in (q, k, v)), None, 1, None, lengths, None, 0.3)
    assert_near(got, dense, torch.float32)


@pytest.mark.parametrize("blocks", [False, True])
def test_listed_pages(host, blocks):
    q, k, v = qkv(2, 100, 2, 4, 2, 16, 16)
    lengths = int32(100, 40)
    k, v = (poisoned(x, int32(0, 0), lengths) for x in (k, v))
    lists = torch.stack([torch.randperm(7) for _ in range(4)]).view(2, 2, 7).int().to(DEVICE)
    counts = int32(5, 3, 7, 0).view(2, 2)
    lists = lists.masked_fill(torch.arange(7, device=DEVICE) >= counts[..., None], 10**6)
    view = (None, 1)
    if blocks:  # each key by its own index
        order = torch.stack([torch.randperm(100) + 100 * b for b in range(2)]).int().to(DEVICE)
        k, v = (scattered(x, order) for x in (k, v))
        view = (order, 1)
    got = host.page_attention(q, k, v, lists, counts, *view, None, lengths, None, 0.3)
    want = page_attention_reference(*(x.double() for x in (q, k, v)), lists, counts, *view, None, lengths, None, 0.3)
    assert_near(got, want, torch.float32)


@pytest.mark.parametrize("masked", [None, "bool", "numbers"])
def test_heads_with_windows_among_listed_pages(host, masked):
    """Heads 1 and 2 see the first 3 keys of their row and its last 20; each head by itself is attention to just these."""
    q, k, v = qkv(1, 150)
    start, lengths = int32(0, 37), int32(150, 90)
    lists = torch.arange(10, dtype=torch.int32, device=DEVICE).expand(2, 2, 10)
    counts, windows = int32(10, 10, 10, 10).view(2, 2), [0, 20, 20, 0]
    j, (first, end) = torch.arange(150, device=DEVICE), (x[:, None] for x in (start, start + lengths))
    near = (j >= first) & ((j >= end - 20) | (j < first + 3))
    seen = torch.where(torch.tensor(windows, device=DEVICE)[:, None] > 0, near[:, None], True)[:, :, None]
    mask = {
        None: None,
        "bool": torch.rand(2, 1, 1, 150, device=DEVICE) < 0.7,
        "numbers": torch.randn(1, 4, 1, 150, device=DEVICE),
    }[masked]
    both_masks = seen if mask is None else seen & mask if masked == "bool" else torch.where(seen, mask, -torch.inf)
    given = (lists, counts, None, 1, start, lengths, None, 0.3)
    want = page_attention_reference(*(x.double() for x in (q, k, v)), *given, mask=both_masks)
    for run, dtype in ((host.page_attention, torch.float32), (page_attention_reference, torch.float64)):
        assert_near(run(*(x.to(dtype) for x in (q, k, v)), *given, mask=mask, windows=windows, first_keys=3), want, torch.float32)


def scattered(x, order):
    """x by position -> stored so that position j of row b lies at row `order[b, j] % L` of its batch row."""
    to = torch.empty_like(x)
    for b in range(x.shape[0]):
        to[b, :, (order[b] % x.shape[2]).long()] = x[b]
    return to


def test_scores_of_the_first_and_the_last_row(host):
    q, k, v = qkv(3, 70, 2, 4, 2, 16, 16)
    lengths = int32(70, 21)
    k = poisoned(k, int32(0, 0), lengths)
    v = poisoned(v, int32(0, 0), lengths)
    got, want = both(host, q, k, v, None, 1, None, lengths, None, 0.3, scores=True, softcap=3.0)
    assert_near(got, want, torch.float32)
    assert got[2].shape == (2, 4, 2, 70)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["window", "mask", "start", "bidirectional", "many heads", "half"])
def test_scores_are_hidden_as_keys_are(host, given):
    """In every tile of the capacity, those that no row sees, too; of two rows, and of one, which is both."""
    heads = 40 if given == "many heads" else 4
    for rows in (1, 5):
        q, k, v = qkv(rows, 150, 2, heads, 2, 16, 16, torch.float16 if given == "half" else torch.float32)
        start, lengths = (int32(70, 3), int32(40, 60)) if given == "start" else (None, int32(130, 44))
        masks = {"causal": given != "bidirectional", "window": 20 if given == "window" else 0}
        if given == "mask":
            masks["mask"] = torch.randn(2, 1, rows, 150, device=DEVICE).masked_fill(
                torch.rand(150, device=DEVICE) < 0.3, -torch.inf
            )
        got = host.decode_attention(q, k, v, None, 1, start, lengths, None, 0.3, scores=True, **masks)
        want = decode_attention_reference(q, k, v, None, 1, start, lengths, None, 0.3, scores=True, **masks)
        assert got[2].dtype == want[2].dtype == (torch.float16 if given == "half" else torch.float32)
        assert torch.equal(got[2] == -torch.inf, want[2] == -torch.inf)
        torch.testing.assert_close(
            got[2], want[2], rtol=1e-3 if given == "half" else 1e-5, atol=2e-3 if given == "half" else 1e-5
        )


def test_a_score_that_half_precision_cannot_say():
    q, k, v = qkv(1, 20, 1, 2, 1, 16, 16, torch.float16)
    scores = decode_attention_reference(900 * q, 900 * k, v, None, 1, None, None, None, 1.0, scores=True)[2]
    assert scores.abs().max() == 60000


def test_parts_fill_whole_waves():
    from tsa_compile.kernels.common.launch import split_count

    assert 31 <= split_count(8, 2048, 264) <= 33  # one row of 128K: one wave
    assert split_count(264, 2048, 264) == 1
    assert split_count(8, 5, 264) == 5  # no more parts than tiles
    for programs in (1, 7, 20, 64, 160, 300, 1000):
        n = split_count(programs, 2048, 264) * programs / 264
        assert n <= 1 or n / math.ceil(n) > 0.85


# ---- the operators


def test_opcheck():
    q, k, v = qkv(3, 20, v_dim=8, device="cpu")
    lengths, mask = int32(20, 7, device="cpu"), torch.rand(2, 1, 1, 20) < 0.5
    arguments = (q, k, v, None, 1, None, lengths, None, 0.3)
    torch.library.opcheck(torch.ops.tsa.decode_attention.default, arguments)
    torch.library.opcheck(torch.ops.tsa.decode_attention.default, arguments, {"mask": mask, "scores": True, "window": 4})
    lists, counts = torch.zeros(2, 2, 2, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32)
    torch.library.opcheck(torch.ops.tsa.page_attention.default, (q, k, v, lists, counts, *arguments[3:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 4, 17, 16)}, "q must have 1 to 16 rows, got 17"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths must be contiguous int32 .2."),
        ({"lengths": torch.zeros(2)}, "lengths must be contiguous int32"),
        ({"k": torch.randn(3, 2, 20, 16), "v": torch.randn(3, 2, 20, 16)}, "batch"),
        ({"key_mask": torch.ones(2, 19, dtype=torch.bool)}, "key_mask must be bool .2, 20."),
        ({"mask": torch.zeros(2, 3, 1, 20)}, "mask must be bool or floating point .2, 4, 1, 20."),
        ({"sinks": torch.zeros(2)}, "sinks must be one logit for each of 4 heads"),
        ({"window": 4, "causal": False}, "a window needs causal=True"),
        ({"softcap": -1.0}, "softcap and window must be at least 0"),
        ({"blocks": torch.zeros(2, 3, dtype=torch.int32), "block": 6}, "block must divide the 20 rows of k, got 6"),
    ],
)
def test_errors_name_the_argument(changes, message):
    q, k, v = qkv(1, 20, device="cpu")
    names = ("q", "k", "v", "blocks", "block", "start", "lengths", "key_mask", "scale")
    given = dict(zip(names, (q, k, v, None, 1, None, None, None, 0.3), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.tsa.decode_attention(**given)
