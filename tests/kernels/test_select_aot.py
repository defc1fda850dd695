"""Every variant of the selection kernels compiles ahead of time for several GPUs, on a machine without one."""

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
from triton.experimental.gluon._runtime import GluonASTSource
from tsa_compile.kernels.score.last_queries import device as scores
from tsa_compile.kernels.select.tokens import count_device as count
from tsa_compile.kernels.select.tokens import device as select

TYPES = {"mean": "*fp32", "scores": "*fp32", "gathered": "*fp32", "part_max": "*fp32", "part_sum": "*fp32",
         "masses": "*i64", "candidates": "*i64", "mass_bins": "*i64", "bins": "*i32", "cuts": "*i32", "counts": "*i32",
         "through": "*i32", "indices": "*i32", "heavy_indices": "*i32", "order": "*i32", "ranks": "*i32", "scale_log2": "fp32",
         "coverage_bits": "i64"}

def compile_kernel(kernel, capability, dtype="bf16", warps=4, stages=2, **constants):
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "*" + dtype if n in "qk" else "i32") for n in names}
    wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n[1:3] == "_s"}
    source = (GluonASTSource if "hopper" in kernel.__name__ else ASTSource)(kernel, signature, constants, wide)
    options = {"num_warps": warps, "num_stages": stages}
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]

capability = int(sys.argv[1])
if capability == 90:
    from tsa_compile.kernels.score.last_queries import hopper_device as hopper
    for dim, heads, stages in ((128, 2, 4), (64, 1, 4)):  # as token_scores/hopper.py launches them
        shape = dict(D=dim, HEADS=heads, STAGES=stages, PADDED=heads == 1, SPLITS=16)
        for first, second in ((True, True), (True, False), (False, True)):
            compile_kernel(hopper.score_hopper_kernel, 90, LSE=first, MEAN=second, **shape)
for padded in (False, True):
    for dtype, dim, m, n in (("bf16", 128, 128, 128), ("fp16", 80, 16, 128), ("fp32", 64, 64, 32), ("bf16", 256, 64, 64)):
        shape = dict(D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=m, BLOCK_N=n, PADDED=padded,
                     PRECISION="tf32x3" if dtype == "fp32" else "ieee")
        for kernel in (scores.score_lse_kernel, scores.score_mean_kernel):
            compile_kernel(kernel, capability, dtype, **shape)
    compile_kernel(count.pool_kernel, capability, warps=8, HEADS=32, BLOCK=32, PADDED=padded)
    compile_kernel(count.count_kernel, capability, warps=16, BLOCK=4096, PADDED=padded)
    for kernel in (select.select_kernel, select.bin_kernel, select.cut_kernel, select.write_kernel):
        compile_kernel(kernel, capability, warps=8, CHUNK=8192, BLOCK=2048, PADDED=padded)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
