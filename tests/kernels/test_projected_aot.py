"""The kernels of projected keys compile ahead of time for several GPUs, on a machine without one."""

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
from tsa_compile.kernels.score.projected.device import projected_scores_kernel
from tsa_compile.kernels.select.joined_pages.device import join_pages_kernel
from tsa_compile.kernels.state.append_projected.device import append_projected_kernel

FLOATS = ("frequencies", "logits", "parts")
TYPES = {**dict.fromkeys(FLOATS, "*fp32"), "placed": "*i64", "key_mask": "*i1", "flags": "*i8", "factor": "fp32"}
INTS = ("positions", "counts", "begin", "end", "start", "lengths", "heads", "indices", "list_counts", "out", "out_counts",
        "owners", "sinks", "recent")
TYPES |= dict.fromkeys(INTS, "*i32")
capability = int(sys.argv[1])

def compile_kernel(kernel, dtype, warps, given, **constants):
    names = [p.name for p in kernel.params]
    kinds = {**TYPES, **dict.fromkeys(("q", "k", "index", "query", "key"), "*" + dtype)}
    absent = {n: None for n in ("key_mask", "start", "lengths") if n in names and not given}
    constants = absent | {n: x for n, x in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    source = ASTSource(kernel, signature, {(names.index(n),): x for n, x in constants.items()}, wide)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 3})
    assert made.asm["cubin"] and made.metadata.shared <= 101376, made.metadata.shared

CASES = (("bf16", 128, 16, 64, False), ("fp16", 80, 10, 16, True), ("fp32", 256, 32, 128, False))
for dtype, dim, width, pairs, interleaved in CASES:
    shape = dict(D=dim, R=width, BLOCK_D=triton.next_power_of_2(dim), PAIRS=pairs, INTERLEAVED=interleaved, CHUNK=64, AT_ONCE=16,
                 ROWS=32 if dtype == "fp32" else 64, PRECISION="tf32x3" if dtype == "fp32" else "ieee", k_sd=1, q_sd=1)
    for given in (False, True):
        compile_kernel(append_projected_kernel, dtype, 4, given, BLOCK_R=max(16, triton.next_power_of_2(width)), **shape)
        compile_kernel(projected_scores_kernel, dtype, 4, given, BLOCK_R=triton.next_power_of_2(width), **shape)
        compile_kernel(join_pages_kernel, dtype, 8, given, BLOCK=1024)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_compiles_ahead_of_time(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
