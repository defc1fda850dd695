"""What is unusual: numbers that are not finite, empty batches, many rows, GPUs that are not what they seem."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import flat
from tsa_compile.kernels import checks
from tsa_compile.kernels.common import tiles
from tsa_compile.kernels.common.launch import tiles_in_yz
from tsa_compile.kernels.common.ranks import rank_order
from tsa_compile.kernels.types import Operands, TokenRule

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = (0.3, 0.2, 8, 3, 16, 4)  # scale, coverage, window, pool, min_tokens, heavy
BLOCKS = (0.2, 32, 40, 4, 20, "head")  # alpha, pool, window, sinks, last_dense, share


def qkv(batch=1, heads=4, kv_heads=2, length=70, dim=16):
    return tuple(torch.randn(batch, h, length, dim, device=DEVICE) for h in (heads, kv_heads, kv_heads))


# ---- numbers that are not finite


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("where", ["key", "query"])
def test_a_head_that_is_not_finite_counts_for_nothing_in_any_form(value, share, where):
    q, k, _ = qkv(batch=2)
    (k if where == "key" else q)[0, 0, 5 if where == "key" else -3, 2] = value
    want = flat.select_tokens_reference(q, k, None, *NUMBERS, share=share)
    got = flat.select_tokens(q, k, None, *NUMBERS, share=share)
    assert torch.equal(want.counts, got.counts)
    assert 0 < int(want.counts[0]) < 70
    assert torch.equal(want.indices, got.indices)
    assert torch.equal(want.heavy_indices, got.heavy_indices)


def test_no_score_is_finite():
    q, k, _ = qkv()
    k[:] = torch.nan
    want, got = (f(q, k, None, *NUMBERS) for f in (flat.select_tokens_reference, flat.select_tokens))
    assert torch.equal(want.counts, got.counts)
    assert torch.equal(want.indices, got.indices)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_probes_that_are_not_finite(value):
    q, k, _ = qkv()
    k[0, 1, 9, 0] = value
    want, got = (f(q, k, None, 0.3, 0.2, 8, 8) for f in (flat.select_keys_reference, flat.select_keys))
    assert torch.equal(want.counts, got.counts)
    assert torch.equal(want.indices, got.indices)


# ---- empty


def test_an_empty_batch_is_an_empty_result():
    q, k, v = (x[:0] for x in qkv())
    mask = torch.ones(0, 70, dtype=torch.bool, device=DEVICE)
    for m in (None, mask):
        kept = flat.select_tokens(q, k, m, *NUMBERS)
        assert kept.indices.shape == (0, 4, 70)
        for engine in ("fused", "auto"):
            out, lse = flat.with_lse(flat.sparse_attention)(q, k, v, *kept, m, 0.3, 8, 2, 0, engine)
            assert out.shape == q.shape
            assert lse.shape == (0, 4, 70)
        keys = flat.select_keys(q, k, m, 0.3, 0.2, 8, 8)
        assert flat.key_attention(q, k, v, *keys, 0.3).shape == q.shape
        assert torch.ops.tsa.token_sparse_attention(q, k, v, m, *NUMBERS[:5], 8, 2, 4, "auto").shape == q.shape
    assert flat.token_block_attention(q, k, v, *kept, None, 0.3, 8, 2, BLOCKS, "fused").shape == q.shape


# ---- large


def test_grids_are_long_in_x_alone(monkeypatch):
    """Every launch of a call, recorded in place of running it, stays below what CUDA takes in y and z for 70,000 rows."""
    from triton.runtime.interpreter import InterpretedFunction

    grids = {}

    def record(self, *args, grid, warmup, **kwargs):
        grids[self.__name__] = (*grid, 1, 1)[:3]

    monkeypatch.setattr(InterpretedFunction, "run", record)
    q, k = (torch.empty(1, 1, 1, 16).expand(70_000, 1, 40, 16) for _ in range(2))
    mask = torch.ones(70_000, 40, dtype=torch.bool)
    rank_order(mask)
    kept = flat.select_tokens(q, k, mask, 0.3, 0.2, 8, 3, 16, 4)
    flat.sparse_attention(q, k, k, *kept, mask, 0.3, 8, 2, 0, "fused")
    flat.key_attention(q, k, k, *flat.select_keys(q, k, None, 0.3, 0.2, 8, 8), 0.3)
    flat.token_block_attention(q, k, k, *kept, None, 0.3, 8, 2, BLOCKS, "fused")
    expected = {"order_kernel", "pool_kernel", "count_kernel", "select_kernel", "sparse_prefill_kernel", "invert_kernel"}
    expected |= {"strip_kernel", "pack_keys_kernel", "key_attention_kernel", "pack_kernel"}
    expected |= {"key_block_means_kernel", "select_key_blocks_kernel", "key_block_attention_kernel"}
    assert expected <= set(grids)
    assert all(y <= 65535 and z <= 65535 for _, y, z in grids.values()), grids


@pytest.mark.parametrize("number", [0, 1, 65535, 65536, 262144, 10**7])
def test_tiles_in_y_and_z(number):
    y, z = tiles_in_yz(number)
    assert number <= y * z < number + max(1, z)
    assert max(y, z) <= 65535


def test_rows_beyond_what_the_kernels_count_are_refused():
    def x(length):
        one = torch.empty(1, 1, 1, 16, device="meta")
        return Operands(one, one.expand(1, 1, length, 16), None)

    checks.select_tokens(x((1 << 24) - 1), 0.3, TokenRule(0.1, 8, 3, 16), "head")
    with pytest.raises(ValueError, match="a row must have fewer than 16777216 keys, got 16777216"):
        checks.select_tokens(x(1 << 24), 0.3, TokenRule(0.1, 8, 3, 16), "head")
    with pytest.raises(ValueError, match="a row must have fewer than 16777216 keys"):
        checks.select_keys(x(1 << 24), 0.3, 0.1, 8, 8)


# ---- GPUs


def test_a_gpu_of_rocm_is_no_hopper(monkeypatch):
    from tsa_compile.kernels.attend.tokens import hopper as prefill
    from tsa_compile.kernels.score.last_queries import hopper as scores

    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(tiles, "_capability", lambda device: (9, 0))
    assert tiles.capability_of(torch.device("cuda", 0)) == (0, 0)

    class OnGpu:
        device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (1, 8, 4096, 128)

        def stride(self):
            return (8 * 4096 * 128, 4096 * 128, 128, 1)

        def data_ptr(self):
            return 256

    x = OnGpu()
    assert not prefill.takes(x, x, x)
    assert not scores.takes(x, x, 128)
    monkeypatch.setattr(torch.version, "hip", None)
    assert prefill.takes(x, x, x)
    assert scores.takes(x, x, 128)


@pytest.mark.parametrize("message", ["Triton Error [CUDA]: too many blocks in cooperative launch", "out of memory"])
def test_a_cooperative_launch_that_fails_once_is_not_tried_again(monkeypatch, message):
    from tsa_compile.kernels.score.last_queries import hopper, hopper_device

    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **kwargs):
            calls.append((kwargs["LSE"], kwargs["MEAN"]))
            if kwargs.get("launch_cooperative_grid"):
                raise RuntimeError(message)

    monkeypatch.setattr(hopper_device, "score_hopper_kernel", Kernel())
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(hopper, "_REFUSED", set())
    monkeypatch.setattr(hopper, "_plan", hopper._plan.__wrapped__)  # nothing is kept of this kernel
    q, k = torch.empty(1, 8, 300, 64).half(), torch.empty(1, 2, 300, 64).half()
    unread = torch.zeros(8, dtype=torch.int32)
    arguments = (q, k, unread, unread, False, 0.2, 128, torch.empty(1, 8, 300), unread)
    if message == "out of memory":
        with pytest.raises(RuntimeError, match=message):
            hopper.launch(*arguments)
        return
    hopper.launch(*arguments)
    hopper.launch(*arguments)
    two = [(True, False), (False, True)]
    assert calls == [(True, True), *two, *two]
