"""The kernels of block-sparse prefill compile ahead of time for several GPUs, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import re
import subprocess
import sys
import tempfile
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tsa_compile.kernels.attend.pages.device import key_block_attention_kernel
from tsa_compile.kernels.attend.pages.host import tile_config
from tsa_compile.kernels.common.row_blocks import finest_pool
from tsa_compile.kernels.score.page_mass.device import key_block_means_kernel
from tsa_compile.kernels.select.threshold_pages.device import select_key_blocks_kernel
from tsa_compile.kernels.select.threshold_pages.host import step, tile

TYPES = {"means": "*fp32", "counts": "*i32", "key_mask": "*i1",
         "lse": "*fp32", "bits": "*i64", "starts": "*i32", "lengths": "*i32", "alphas": "*fp32",
         "scratch": "*i32", "blocks": "*i32", "queue": "*i32", "flags": "*i32", "scale_log2": "fp32", "alpha_log2": "fp32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
capability = int(sys.argv[1])

def compile_kernel(kernel, dtype, constants, **options):
    names = [p.name for p in kernel.params]
    pointers = ("q", "k", "v", "out")
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "*" + dtype if n in pointers else "i32") for n in names}
    wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n[1:3] == "_s"}
    made = triton.compile(ASTSource(kernel, signature, constants, wide), target=GPUTarget("cuda", capability, 32),
                          options=options)
    assert made.asm["cubin"]
    if made.metadata.shared > SHARED[capability]:
        large.append((kernel.__name__, dtype, dim, options, made.metadata.shared))

FORMS = {"order": ((False, ("bf16", 128)), (True, ("fp32", 64))), "blocks": (),
         **{dtype: tuple((True, (dtype, dim)) for dim in (64, 128, 256)) for dtype in DTYPES}}
large = []
for padded, (dtype, dim) in FORMS[sys.argv[2]]:
    view = dict(START=padded, LENGTH=padded, MASK=padded)
    table = {} if padded else {"blocks": None}
    compile_kernel(key_block_means_kernel, dtype, dict(D=dim, BLOCK_D=dim, KEYS=64, **view, **table), num_warps=4)
    for pool in (16, finest_pool(dim)) if sys.argv[2] in DTYPES else (16,) if padded else (128, 16):
        together, warps = tile(pool, dim)
        precise = "tf32x3" if dtype == "fp32" else "ieee"
        shape = dict(D=dim, BLOCK_D=dim, POOL=pool, PER=128 // pool, ROW_BLOCKS=together, STEP=step(dim, DTYPES[dtype]),
                     BY_HEAD=padded, POOLING=precise, PRECISION="tf32x3" if dtype == "fp32" else "tf32", **view)
        compile_kernel(select_key_blocks_kernel, dtype, shape, num_warps=warps, num_stages=2 if dim <= 128 else 1)
    config = tile_config(dim, DTYPES[dtype], (capability // 10, capability % 10))
    shape = dict(D=dim, DV=dim, BLOCK_D=dim, BLOCK_DV=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                 PER=64 // config.block_n, CHUNK=16, LSE=padded, PRECISION=precise, **view, **table)
    compile_kernel(key_block_attention_kernel, dtype, shape, **config.options)
assert not large, large
if capability == 90 and sys.argv[2] not in DTYPES:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from tsa_compile.kernels.attend.pages.hopper import kernel_of

    def pieces(dtype, rows, columns):
        return f"tensordesc<{dtype}[1, 1, {rows}, {columns}],{gl.NVMMASharedLayout(128, 16, 4)!r}>"

    def spilled(ptx):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "x.ptx").write_text(ptx)
            command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "x.ptx", "-o", "x.cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stderr
        return max(int(n) for n in re.findall(r"(\\d+) bytes spill", said))

    def compile_hopper(dtype, dim, all_forms, table):
        hopper, stages, columns = kernel_of(dim)
        types = TYPES | {"q": pieces(dtype, 128, dim), "k": pieces(dtype, 64, columns), "v": pieces(dtype, 64, columns),
                         "out": "*" + dtype, "holes": "*i32", "table": "*i32"}
        constants = dict(D=dim, **stages, TABLE=table, **dict.fromkeys(("START", "LENGTH", "MASK", "LSE"), all_forms))
        names = [p.name for p in hopper.params]
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        wide = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n[1:3] == "_s"}
        kernel = triton.compile(GluonASTSource(hopper, signature, constants, wide), target=GPUTarget("cuda", 90, 32),
                                options={"num_warps": 4})
        assert kernel.metadata.shared <= 232448
        assert spilled(kernel.asm["ptx"]) <= 128  # a few numbers a tile, none in a step of the loops
        copy = rf"async_tma_copy_global_to_local %\\w+\\[%\\w+, %\\w+, (%\\w+),.*<1x1x64x{columns}x"
        copies = re.findall(copy, kernel.asm["ttgir"])
        loops = [x for x in re.findall(r"scf.for .*iter_args\\((.*?)\\)", kernel.asm["ttgir"]) if copies[-1] + " =" in x]
        each = 2 if dim == 256 else 4  # copies of keys and values in a step
        assert len(set(copies)) == each and len(loops) == 1, (copies, loops)
        carried = [row for row in copies if row + " =" in loops[0]]  # from step to step; in blocks, the table is read in each
        assert len(set(carried)) == (each // 2 if table else each), (copies, loops)

    for dim in (128, 256):
        compile_hopper("bf16", dim, True, sys.argv[2] == "blocks")
    if sys.argv[2] == "order":
        compile_hopper("fp16", 256, False, False)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "keys"),
    [
        (80, "order"),
        (90, "order"),
        (90, "blocks"),
        *((n, dtype) for n in (80, 86, 89, 90, 100, 120) for dtype in ("bf16", "fp16", "fp32")),
    ],
)
def test_compiles_ahead_of_time(capability, keys, tmp_path):
    """In the keys' order, or in blocks; of a dtype every head dim within the GPU's shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability), keys], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
