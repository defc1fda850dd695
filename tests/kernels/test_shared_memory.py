"""Every kernel with tiles fits the shared memory of every GPU: compiled ahead of time, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
from tsa_compile.export.native.aot import compile_triton
from tsa_compile.export.native.aot_form import Form, parameters
from tsa_compile.export.native.aot_kernels import kernels_of
from tsa_compile.kernels.attend.keys.device import key_attention_kernel
from tsa_compile.kernels.attend.keys.host import key_config
from tsa_compile.kernels.common.padding_device import padding_kernel
from tsa_compile.kernels.common.tiles import precision, strip_config
from tsa_compile.kernels.score.probes import device as probes
from tsa_compile.kernels.score.probes.host import probe_config

LIMIT = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}
POINTERS = {"counts": "*i32", "indices": "*i32", "order": "*i32", "ranks": "*i32", "blocks": "*i16", "block_counts": "*i32",
            "part_max": "*fp32", "part_sum": "*fp32", "mean": "*fp32", "masses": "*fp32", "lse": "*fp32"}
TENSORS = ("q", "k", "v", "out", "packed_k", "packed_v", "queries", "keys")

def compiled(function, dtype, capability, constants, warps, stages):
    names = [p for p in parameters(function) if p not in constants]
    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    types = {p: POINTERS.get(p) or (f"*{kind}" if p in TENSORS else "fp32" if p == "scale_log2" else "i32") for p in names}
    wide = [p for p in names if types[p][0] == "*" or p[1:3] == "_s"]
    return compile_triton(function, types, constants, wide, dict(num_warps=warps, num_stages=stages), capability)

def others(dtype, dim, cap):
    same = dict(D=dim, BLOCK_D=dim, PRECISION=precision(dtype))
    attend = dict(same, DV=dim, BLOCK_DV=dim)
    c = key_config(dim, dtype, cap)
    tile = dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n)
    yield "keys", key_attention_kernel, dict(attend, **tile, lse=None), c.num_warps, c.num_stages
    d, m, n, warps, stages = probe_config(dim, dtype, 128, cap)
    for f in (probes.probe_lse_kernel, probes.probe_mean_kernel):
        yield f.__name__, f, dict(same, BLOCK_M=m, BLOCK_N=n, PADDED=True), warps, stages
    c = strip_config(dim, dtype, cap)
    tile = dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, lse=None)
    yield "padding", padding_kernel, dict(attend, **tile), c.num_warps, c.num_stages

capability, dtype, dim, only = tuple(map(int, sys.argv[1].split("."))), getattr(torch, sys.argv[2]), int(sys.argv[3]), sys.argv[4]
found = {}
for kernel in kernels_of(Form.of(dtype, dim, dim, 128, True, True, 4), capability):
    if "BLOCK_M" in kernel.constants and only in ("", kernel.name):
        made = compile_triton(kernel.function, kernel.types(), kernel.constants, kernel.divisible(), kernel.options, capability)
        found[kernel.name] = made.metadata.shared
for name, function, constants, warps, stages in others(dtype, dim, capability):
    if only in ("", name):
        found[name] = compiled(function, dtype, capability, constants, warps, stages).metadata.shared
assert found
large = {name: shared for name, shared in found.items() if shared > LIMIT[capability]}
print(large or "fits")
"""


def fits(tmp_path, capability, dtype, dim, only=""):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, capability, dtype, str(dim), only]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "fits", done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["prefill", "strip", "padding"])
def test_float32_with_head_dim_128_where_shared_memory_is_small(kernel, tmp_path):
    fits(tmp_path, "8.6", "float32", 128, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_form_on_every_gpu(capability, dtype, dim, tmp_path):
    fits(tmp_path, capability, dtype, dim)
