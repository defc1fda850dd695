"""Pages into slots of a pool: the reference against a loop, Triton against it, and the kernel compiled without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa

SHAPES = [(2, 3, 8, 5), (1, 1, 16, 1), (3, 2, 24, 7)]  # B, Hk, D, pages


def case(batch, kv_heads, dim, pages, dtype=torch.float32):
    store = torch.randn(batch, pages + 2, kv_heads, 16, dim).to(dtype)[:, :pages]  # a part of a larger one
    pool = torch.full((batch, 6 * 16, kv_heads, dim), torch.nan, dtype=dtype).transpose(1, 2)
    moves = [(b, p, s) for b in range(batch) for p, s in ((pages - 1, 4), (0, 0), (pages // 2, 5))[: 3 if pages > 2 else 1]]
    return pool, store, moves


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_are_where_they_were_sent_and_nothing_else_is_written(shape):
    pool, store, moves = case(*shape)
    expected = pool.clone()
    for b, p, s in moves:
        expected[b, :, 16 * s : 16 * s + 16] = store[b, p]
    torch.ops.tsa.load_pages(pool, store, torch.tensor(moves, dtype=torch.int32))
    assert torch.equal(pool.nan_to_num(7.0), expected.nan_to_num(7.0))
    torch.ops.tsa.load_pages(pool, store, torch.empty(0, 3, dtype=torch.int32))
    assert torch.equal(pool.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_does_the_same(shape, dtype):
    pytest.importorskip("triton")
    from tsa_compile.kernels.state.load_pages.host import load_pages

    pool, store, moves = case(*shape, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    listed, ours = torch.tensor(moves, dtype=torch.int32), pool.clone().to(device)
    torch.ops.tsa.load_pages(pool, store, listed)
    load_pages(ours, store.pin_memory() if device == "cuda" else store, listed.to(device))
    assert torch.equal(ours.cpu().nan_to_num(7.0), pool.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pool=torch.zeros(1, 1, 17, 8)), r"pool must be \[B, Hk, a multiple of 16, D\], got \(1, 1, 17, 8\)"),
        (dict(store=torch.zeros(1, 2, 1, 16, 9)), r"store must be torch.float32 \[1, pages, 1, 16, 8\], got"),
        (dict(store=torch.zeros(1, 2, 1, 8, 16).transpose(3, 4)), "a page of store must lie in one piece"),
        (dict(moves=torch.zeros(1, 3)), r"moves must be contiguous int32 \[n, 3\], got torch.float32 \(1, 3\)"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = dict(pool=torch.zeros(1, 1, 32, 8), store=torch.zeros(1, 2, 1, 16, 8), moves=torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"tsa::load_pages: {message}"):
        torch.ops.tsa.load_pages(*{**good, **change}.values())


SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tsa_compile.kernels.state.load_pages.device import load_pages_kernel as kernel
names = [p.name for p in kernel.params]
constants = {"D": 128, "BLOCK_D": 128}
types = {"pool": "*bf16", "store": "*bf16", "moves": "*i32"}
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types or "_s" in n}
made = triton.compile(ASTSource(kernel, signature, constants, wide), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert made.asm["cubin"]
assert "ld.global" in made.asm["ptx"] and ".v4" in made.asm["ptx"], "loads are not wide"
print("compiled")
"""


@pytest.mark.slow
def test_it_compiles_for_hopper_with_wide_loads():
    pytest.importorskip("triton")
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, env=compiled)
    assert "compiled" in done.stdout, done.stderr
