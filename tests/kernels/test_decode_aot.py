"""The decode kernels compile ahead of time for several GPUs, on a machine without one, within their shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import dataclasses
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tsa_compile.kernels.attend.decode import device, listed_device
from tsa_compile.kernels.attend.decode.config import decode_config
from tsa_compile.kernels.common.splits_device import merge_kernel
from tsa_compile.kernels.score.page_index import device as scores
from tsa_compile.kernels.score.page_index.host import CONFIG as SCORES, stages_of
from tsa_compile.kernels.select.top_pages import bins_device, list_device, shares_device
from tsa_compile.kernels.select.top_pages.host import CONFIG
from tsa_compile.kernels.state.append_pages import device as append
from tsa_compile.kernels.state.listed_keys import device as listed

SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {"lse": "*fp32", "part": "*fp32", "part_lse": "*fp32", "blocks": "*i32", "start": "*i32", "lengths": "*i32",
         "key_mask": "*i1", "sinks": "*bf16", "pages": "*i32", "counts": "*i32", "dumped": "*fp16",
         "windows": "*i32", "scale": "fp32", "softcap": "fp32"}
OPTIONAL = ("blocks", "start", "lengths", "key_mask", "bias", "sinks", "pages", "counts", "dumped", "windows")

def compile_kernel(kernel, capability, dtype, warps, stages, constants, **pointers):
    names = [p.name for p in kernel.params]
    kinds = {**TYPES, **dict.fromkeys(("q", "k", "v", "out"), "*" + dtype), **pointers}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    aligned = ("q_s", "k_s", "v_s", "o_s", "sums_sb", "sums_sh", "sums_sp")
    wide = [i for i, n in enumerate(names) if signature[n][0] == "*" or (n[:3] in aligned and n[3] != "d") or n in aligned]
    wide = {(i,): [["tt.divisibility", 16]] for i in wide}
    constants = {(names.index(n),): value for n, value in constants.items() if n in names}
    source = ASTSource(kernel, signature, constants, wide)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.metadata.shared <= SHARED[capability], (constants, made.metadata.shared)
    return made

def decode(capability, dtype, dim, v_dim, queries, swap=False, given=(), one=False, bias="*fp32", **more):
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
    config = decode_config(queries, block_d, block_dv, DTYPES[dtype], (capability // 10, capability % 10),
                           "bias" in given, scores="dumped" in given)
    none = {n: None for n in OPTIONAL if n not in given}
    constants = dict(none, q_sd=1, k_sd=1, v_sd=1, D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m,
                     BLOCK_N=config.block_n, CAUSAL=True, CAPPED=False, ONE=one, SWAP=swap, BLOCK_E=16,
                     PRECISION="tf32x3" if dtype == "fp32" else "ieee") | more
    return compile_kernel(device.decode_kernel, capability, dtype, config.num_warps, config.num_stages, constants, bias=bias)

def page_scores(capability, dtype, sums, dim, queries, **more):
    stages = stages_of(64 * dim * (2 if sums == "bf16" else 4), SCORES.num_stages)
    shape = dict(D=dim, BLOCK_D=dim, BLOCK_M=max(16, queries), Q=queries, CHUNK=64, STAGES=stages, q_sd=1,
                 PRECISION="ieee" if sums == "bf16" else "tf32x3") | more
    made = compile_kernel(scores.page_scores_kernel, capability, dtype, SCORES.num_warps, 3, shape, sums="*" + sums, **numbers)
    assert stages == 1 or "cp.async.cg" in made.asm["ptx"]

capability = int(sys.argv[1])
numbers = {"keep": "*i64", "mass_bits": "i64", "logits": "*fp32", "parts": "*fp32", "scores": "*i32", "gathered": "*fp32",
           "indices": "*i32", "list_counts": "*i32", "table": "*i32", "pages": "i32", "sinks": "i32",
           "begin": "*i32", "end": "*i32"}
made = decode(capability, "bf16", 128, 128, 4, given=("lengths",))
assert "cp.async" in made.asm["ptx"] and ", 16," in made.asm["ptx"]  # 16 bytes a thread, in flight
decode(capability, "fp16", 80, 96, 48, given=("lengths", "start", "blocks", "bias", "sinks", "dumped"), CAPPED=True, one=True)
decode(capability, "fp32", 256, 256, 64, given=("lengths",))
decode(capability, "bf16", 128, 128, 28, given=("lengths", "dumped"))
decode(capability, "bf16", 128, 128, 4, given=("lengths", "blocks", "pages", "counts"))
decode(capability, "bf16", 128, 128, 4, given=("lengths", "pages", "counts", "windows"))
for early in (False, True) if capability >= 90 else (False,):  # starts of a launch within another
    for queries, tile, chunks in ((4, 512, 128), (64, 64, 64)):
        shape = dict(start=None, blocks=None, QUERIES=queries, CHUNKS=chunks, TILE=tile, EARLY=early)
        compile_kernel(shares_device.page_shares_kernel, capability, "bf16", CONFIG.share_warps, 3, shape, **numbers)
    shape = dict(keep=None, SMALL=CONFIG.small, BLOCK=CONFIG.block, EARLY=early)
    for mass in (False, True) if capability != 86 else (False,):
        compile_kernel(list_device.page_lists_kernel, capability, "bf16", CONFIG.warps, 3, shape | {"MASS": mass}, **numbers)
page_scores(capability, "bf16", "bf16", 128, 4, start=None, blocks=None)
page_scores(capability, "fp32", "fp32", 256, 16)
page_scores(capability, "fp32", "fp32", 128, 16)
page_scores(capability, "bf16", "bf16", 128, 64)
if capability == 90:
    decode(90, "bf16", 128, 128, 4, swap=True, given=("lengths", "start", "key_mask"))
    decode(90, "fp32", 128, 128, 28, swap=True, given=("lengths",))
    for dtype, sums in (("bf16", "bf16"), ("bf16", "fp32")):
        none = dict(start=None, blocks=None, key_mask=None, k_sd=1, q_sd=1, D=128, BLOCK_D=128)
        compile_kernel(append.append_pages_kernel, 90, dtype, 4, 3, none | {"PAGES": 4}, sums="*" + sums, **numbers)
        del none["key_mask"], none["k_sd"]
        page_scores(90, dtype, sums, 128, 16, **none)
    for mass in (False, True):
        none = dict(start=None, blocks=None, keep=None, QUERIES=4, BLOCK=2048, MASS=mass)
        compile_kernel(bins_device.top_pages_kernel, 90, "bf16", 8, 3, none, **numbers | {"scores": "*fp32"})
    decode(90, "bf16", 256, 256, 64, given=("lengths", "bias", "key_mask"), bias="*i1")
for dtype, dim, given in (("bf16", 128, ("key_mask", "start", "lengths")), ("fp32", 256, ("bias", "sinks"))):
    config = decode_config(4, dim, dim, DTYPES[dtype], (capability // 10, capability % 10), "bias" in given, True)
    constants = {n: None for n in ("start", "lengths", "key_mask", "bias", "sinks") if n not in given}
    constants |= dict(q_sd=1, k_sd=1, v_sd=1, D=dim, DV=dim, BLOCK_D=dim, BLOCK_DV=dim, BLOCK_M=16, BLOCK_N=config.block_n,
                      ONE=False, PRECISION="tf32x3" if dtype == "fp32" else "ieee")
    numbers = {"indices": "*i32", "since": "*i32", "bias": "*fp32"}
    compile_kernel(listed_device.listed_kernel, capability, dtype, config.num_warps, config.num_stages, constants, **numbers)
numbers = dict(scores="*fp16", rank="*fp32", bins="*i32", cuts="*i32", gathered="*fp32", begin="*i32", since="*i32", at="*i32",
               counts="*i32", indices="*i32")
for kernel, sizes in ((listed.weigh_kernel, {"ROWS": 8, "BLOCK": 1024}), (listed.cut_kernel, {"BLOCK": 2048}),
                      (listed.write_kernel, {"BLOCK": 2048}), (listed.crop_kernel, {"BLOCK": 8})):
    compile_kernel(kernel, capability, "bf16", 8, 3, {"CHUNK": 4096} | sizes if "CHUNK" in kernel.arg_names else sizes, **numbers)
none = {"sinks": None, "DV": 128, "BLOCK_DV": 128, "BLOCK_S": 64}
compile_kernel(merge_kernel, capability, "bf16", 4, 2, none)
print("compiled")
"""


@pytest.mark.parametrize("capability", [86, *(pytest.param(c, marks=pytest.mark.slow) for c in (80, 89, 90, 100, 120))])
def test_compiles_ahead_of_time(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
