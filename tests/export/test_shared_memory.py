"""The kernels that the native library ships fit the shared memory of each GPU that it is built for; compiled here, not run."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="extra 'triton' is not installed")

from tsa_compile.export.native import aot

SCRIPT = """
import json, sys, torch
from tsa_compile.export.native import aot
from tsa_compile.export.native.aot_form import Form
from tsa_compile.export.native.aot_kernels import kernels_of

dtype, dim, v_dim, capability = json.loads(sys.argv[1])
form = Form.of(getattr(torch, dtype), dim, v_dim, 64, masked=True, strip=True, group=4)
kernels = [k for k in kernels_of(form, tuple(capability)) if k.name.startswith(("score", "prefill", "strip"))]
print(json.dumps({k.name: aot.compile_kernel(k, tuple(capability)).shared for k in kernels}))
"""
SMALL = [(8, 6), (8, 9), (12, 0)]  # 101,376 bytes a program
CASES = [
    (dtype, dim, v_dim, capability)
    for dtype in ("float32", "float16", "bfloat16")
    for dim, v_dim in ((64, 64), (128, 128), (192, 128), (256, 256))
    for capability in SMALL
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_fits(case):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(case)], capture_output=True, text=True, env=aot._environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout)
    assert {"score_lse", "score_mean", "prefill", "strip"} == set(shared)
    assert 0 < max(shared.values()) <= aot.SHARED[case[-1]]
