"""The kernels of sampled values compile ahead of time for several GPUs, on a machine without one, within their shared memory."""

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
from tsa_compile.kernels.attend.sampled.config import heads_at_once, sampled_config
from tsa_compile.kernels.attend.sampled.device import add_parts_kernel, mass_kernel, sample_kernel
from tsa_compile.kernels.attend.sampled.host import stages_of
from tsa_compile.kernels.attend.sampled.teams_device import team_cut_kernel, team_scores_kernel
from tsa_compile.kernels.attend.sampled.teams_read_device import team_attention_kernel
from tsa_compile.kernels.state.append_teams.device import append_teams_kernel

SHARED = {80: 166912, 86: 101376, 90: 232448, 120: 101376}
FLOATS = ("exponents", "worth", "lse", "weights", "part", "part_lse", "phis")
INTS = ("masses", "totals", "counts", "first_slots", "indices", "blocks", "start", "lengths", "ranks", "cuts",
        "begin", "end", "listed", "places")
TYPES = {**dict.fromkeys(FLOATS, "*fp32"), **dict.fromkeys(INTS, "*i32"), "key_mask": "*i1", "bias": "*fp32", "sinks": "*bf16",
         "seed": "*i64", "teams": "*i64", "scale": "fp32", "softcap": "fp32"}
OPTIONAL = ("blocks", "start", "lengths", "key_mask", "bias", "sinks")
capability = int(sys.argv[1])

def compile_kernel(kernel, dtype, warps, stages, given, **constants):
    names = [p.name for p in kernel.params]
    kinds = {**TYPES, **dict.fromkeys(("q", "k", "v", "out"), "*" + dtype)}
    constants = {n: None for n in OPTIONAL if n in names and n not in given} | {n: x for n, x in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    wide = [i for i, n in enumerate(names) if signature[n][0] == "*" or (n[:3] in ("q_s", "k_s", "v_s", "o_s") and n[3] != "d")]
    source = ASTSource(kernel, signature, {(names.index(n),): x for n, x in constants.items()},
                       {(i,): [["tt.divisibility", 16]] for i in wide})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.metadata.shared <= SHARED[capability], (kernel, constants, made.metadata.shared)
    return made

for dtype, dim, heads, given in (("bf16", 128, 16, ("lengths",)), ("fp32", 256, 64, OPTIONAL)):
    size = 4 if dtype == "fp32" else 2
    precision = "tf32x3" if dtype == "fp32" else "ieee"
    shape = dict(D=dim, DV=dim, BLOCK_D=dim, BLOCK_DV=dim, BLOCK_M=heads_at_once(heads, dim * size)[0], CAPPED=dim == 256,
                 PRECISION=precision, q_sd=1, k_sd=1, v_sd=1)
    target = (9, 0) if capability == 90 else (capability // 10, capability % 10)
    one, two = (stages_of(64 * width * size, target) for width in (dim, 2 * dim))
    config = sampled_config(dim * size, dim, target)
    made = compile_kernel(mass_kernel, dtype, config.num_warps, config.num_stages, given, **shape, TILES=config.tiles)
    assert dim > 128 or "cp.async" in made.asm["ptx"]
    for equal in (False, True):
        compile_kernel(sample_kernel, dtype, config.draw_warps, 3, given, **shape, BLOCK_T=1024, CHUNK=config.chunk, EQUAL=equal,
                       ONE=not equal)
    compile_kernel(add_parts_kernel, dtype, 4, 3, given, **shape, AT_ONCE=32)
    compile_kernel(team_scores_kernel, dtype, 4, one, given, **shape, BLOCK_G=heads // 4)
    compile_kernel(team_attention_kernel, dtype, 4, two, given, **shape)
    compile_kernel(append_teams_kernel, dtype, 1, 3, given, **shape, PAGES=4, COUNT=4)
compile_kernel(team_cut_kernel, "bf16", 16, 3, ("lengths",))
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_compiles_ahead_of_time(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
