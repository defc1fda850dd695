"""The kernels of page bases and of completion compile ahead of time for several GPUs, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tsa_compile.kernels.attend.completion import host as completion
from tsa_compile.kernels.attend.completion.device import complete_pages_kernel
from tsa_compile.kernels.score.page_basis.device import refine_scores_kernel
from tsa_compile.kernels.score.page_basis.host import CONFIG
from tsa_compile.kernels.state.append_basis.device import append_basis_kernel

TYPES = { "coords": "*i8", "scales": "*bf16", "key_mask": "*i1", "scale": "fp32"}
TYPES |= dict.fromkeys(("blocks", "start", "begin", "end", "lengths", "indices", "list_counts", "counts", "kept"), "*i32")
TYPES |= dict.fromkeys(("logits", "refined", "parts", "part", "part_lse", "lse"), "*fp32")
SHARED = {80: 166912, 90: 232448, 120: 101376}
capability, dtype = int(sys.argv[1]), sys.argv[2]
precision = "tf32x3" if dtype == "fp32" else "ieee"

def compile_kernel(kernel, warps, basis="*u8", stages=3, **constants):
    names = [p.name for p in kernel.params]
    pointers = ("q", "k", "out", "sums")
    signature = {n: "constexpr" if n in constants else (TYPES | {"basis": basis}).get(n, "*" + dtype if n in pointers else "i32")
                 for n in names}
    wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n.split("_")[-1][0] == "s"}
    made = triton.compile(ASTSource(kernel, signature, constants, wide), target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": warps, "num_stages": stages})
    assert made.asm["cubin"] and made.metadata.shared <= SHARED[capability], made.metadata.shared
    print(kernel.__name__, dim, made.metadata.shared)
    return made

for dim in (64, 80, 128, 256):
    half = max(16, triton.next_power_of_2(dim // 2))
    compile_kernel(append_basis_kernel, 1, D=dim, HALF=half, RANK=8, STEPS=2, ROUND=dtype == "bf16")
    for queries, without in ((16, ()), (4, ("indices", "list_counts", "blocks")), (4, ("blocks", "start"))):
        shape = dict(D=dim, WORDS=dim // 4, BLOCK_W=max(16, triton.next_power_of_2(dim // 4)), BLOCK_M=16, Q=queries, q_sd=1,
                     CHUNK=64, TILE=CONFIG.tile, STEP=2048 // queries, STAGES=CONFIG.num_stages, PRECISION=precision)
        made = compile_kernel(refine_scores_kernel, CONFIG.num_warps, "*i16", **shape, **dict.fromkeys(without))
        assert dtype != "bf16" or dim != 128 or queries == 16 or "cp.async" in made.asm["ptx"]  # 16 bytes a thread, in flight
        assert "ld.global.b8" not in made.asm["ptx"]  # nor by single bytes
    block, bytes_ = triton.next_power_of_2(dim), 4 if dtype == "fp32" else 2
    stages = completion.stages_of(64 * block * bytes_, completion.CONFIG.num_stages)
    for queries in (4, 16):
        shape = dict(DV=dim, BLOCK_DV=block, BLOCK_M=16, Q=queries, CHUNK=64, PRECISION=precision)
        made = compile_kernel(complete_pages_kernel, completion.CONFIG.num_warps, stages=stages, **shape, blocks=None)
        assert "cp.async.cg" in made.asm["ptx"]
shape = dict(D=26, WORDS=13, BLOCK_W=16, BLOCK_M=16, Q=1, CHUNK=64, TILE=CONFIG.tile, STEP=2048, STAGES=CONFIG.num_stages)
compile_kernel(refine_scores_kernel, CONFIG.num_warps, **shape, PRECISION=precision)  # of bytes
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_compiles_ahead_of_time(capability, dtype, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability), dtype], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
