"""Completion of a decode step by the means of unread pages: its definition, the reference, and Triton."""

from __future__ import annotations

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401
from tsa_compile.kernels.attend.completion.reference import complete_pages_reference
from tsa_compile.kernels.attend.decode.reference import decode_attention_reference, page_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
tsa = torch.ops.tsa
SCALE = 0.3


def case(heads=6, kv_heads=2, rows=1, capacity=700, lengths=(700, 333, 7), dtype=torch.float64, equal=False, keep=0.3):
    """(q, k, v, key_mask, view, arguments of the operator); `equal`: all keys of a page are alike, and its values are not."""
    batch = len(lengths)
    draw = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(batch, heads, rows, 16), draw(batch, kv_heads, capacity, 16), draw(batch, kv_heads, capacity, 24)
    if equal:
        k = k[:, :, ::16].repeat_interleave(16, 2)[:, :, :capacity]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    mask = torch.rand(batch, capacity, device=DEVICE) < 0.9
    mask[0, 32:48] = False
    view = (None, 1, None, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    sums, counts = tsa.page_sums(k, *view, mask)
    values, _ = tsa.page_sums(v, *view, mask)
    logits, parts = tsa.page_scores(q, sums, counts, *view, capacity, SCALE)
    lists = tsa.select_pages(logits, parts, counts, *view, capacity, kv_heads, [keep], [0], 0.0, 1, 1)
    out, lse = page_attention_reference(q, k, v, *lists, *view, mask, SCALE)
    return q, k, v, mask, view, (out, lse, logits, values, counts, *lists, *view, capacity)


def test_an_unread_page_enters_by_its_means():
    q, k, v, mask, _, given = case()
    out, lse = complete_pages_reference(*given)
    indices, counts = given[5:7]
    for b, end in enumerate((700, 333, 7)):
        for h in range(6):
            g = h // 3
            read = set(indices[b, g, : counts[b, g]].tolist())
            logits, values = [], []
            for p in range(-(-end // 16)):
                rows = [j for j in range(16 * p, min(16 * p + 16, end)) if mask[b, j]]
                if p in read:
                    logits += [float(q[b, h, 0] @ k[b, g, j]) * SCALE for j in rows]
                    values += [v[b, g, j] for j in rows]
                elif rows:
                    mean = k[b, g, rows].mean(0)
                    logits.append(float(q[b, h, 0] @ mean) * SCALE + torch.tensor(float(len(rows))).log().item())
                    values.append(v[b, g, rows].mean(0))
            weights = torch.tensor(logits, dtype=torch.float64, device=DEVICE)
            torch.testing.assert_close(out[b, h, 0], weights.softmax(0) @ torch.stack(values), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(lse[b, h, 0], weights.logsumexp(0).float(), atol=1e-5, rtol=1e-5)


def test_pages_of_equal_keys_are_complete_and_a_complete_list_is_left_alone():
    q, k, v, mask, view, given = case(equal=True, keep=0.1)
    dense = decode_attention_reference(q, k, v, *view, mask, SCALE)
    out, lse = complete_pages_reference(*given)
    torch.testing.assert_close(out, dense[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, dense[1], atol=1e-5, rtol=1e-5)
    assert (given[0] - dense[0]).abs().max() > 0.01
    _, _, _, _, _, whole = case(keep=1.0)
    assert torch.equal(complete_pages_reference(*whole)[0], whole[0])


def test_what_is_completed_is_between_dropped_and_full():
    """0 <= KL(completed || full) <= KL(dropped || full): in logs of sums, dropped <= completed <= full (CompKV, 2609.26300)."""
    q, k, v, mask, view, given = case()
    full = decode_attention_reference(q, k, v, *view, mask, SCALE)[1]
    completed = complete_pages_reference(*given)[1]
    assert (given[1] <= completed + 1e-5).all()
    assert (completed <= full + 1e-5).all()
    assert (completed - given[1]).max() > 0.01


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "rows"), [(torch.float32, 4, 2, 1), (torch.float16, 9, 1, 3)], ids=str)
def test_triton_against_the_reference(dtype, heads, kv_heads, rows):
    pytest.importorskip("triton")
    from tsa_compile.kernels.attend.completion.host import complete_pages

    _, _, _, _, _, given = case(heads, kv_heads, rows, capacity=1100, lengths=(1100, 333), dtype=dtype)
    given[2][0, ..., 68:], given[2][1, ..., 20:] = torch.nan, torch.nan  # undefined there
    got, want = complete_pages(*given), complete_pages_reference(*given)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert got[0].transpose(1, 2).is_contiguous()


def test_opcheck_and_wrong_arguments():
    _, _, _, _, _, given = case(dtype=torch.float32)
    torch.library.opcheck(tsa.complete_pages.default, given)
    wrong_ones = {0: (given[0][..., :5], "out .* does not fit sums"), 1: (given[1].double(), "lse must be"),
                  2: (given[2][..., :3], "logits must be"), 5: (given[5].long(), "indices must be")}  # fmt: skip
    for number, (wrong, message) in wrong_ones.items():
        with pytest.raises(ValueError, match=f"tsa::complete_pages: {message}"):
            tsa.complete_pages(*given[:number], wrong, *given[number + 1 :])
