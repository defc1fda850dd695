"""On a GPU: ONNX Runtime's CUDA provider runs the custom form by the native library."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("triton", reason="extra 'triton' is not installed")

import tsa_compile.kernels.ops  # noqa: E402, F401  (registers torch.ops.tsa)
from tsa_compile.export import native  # noqa: E402
from tsa_compile.export.native.aot_form import Form  # noqa: E402
from tsa_compile.export.onnx_model.node import Variant  # noqa: E402

CUDA = "CUDAExecutionProvider"
CASES = [  # dtype, head dims, masked, form, tolerance; the second takes the warp-specialised kernel on Hopper
    (torch.float32, 16, 32, True, "strip", 2e-4),
    (torch.float16, 64, 64, False, "paper", 5e-3),
    (torch.float16, 128, 128, False, "strip", 5e-3),
]


@pytest.fixture(scope="module")
def library():
    if CUDA not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu")
    forms = [Form.of(dtype, dim, v_dim, 16, masked, form == "strip", group=2) for dtype, dim, v_dim, masked, form, _ in CASES]
    return native.build_library(forms, [torch.cuda.get_device_capability()])


def session(model, library, options=None):
    options = options or ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    made = ort.InferenceSession(model.SerializeToString(), options, providers=[CUDA, "CPUExecutionProvider"])
    assert made.get_providers()[0] == CUDA
    return made


def operator(site, s, q, k, v, mask):
    """What PyTorch computes by the same kernels; against the reference a token chosen otherwise, in a tie, would count."""
    numbers = (s["coverage"], s["window"], s["pool"], s["min_tokens"], s["strip_window"], s["strip_sinks"], s["heavy"])
    return torch.ops.tsa.token_sparse_attention(q, k, v, mask, site.scale, *numbers, "fused")


@pytest.mark.parametrize(("dtype", "dim", "v_dim", "masked", "form", "atol"), CASES, ids=["fp32", "fp16-64", "fp16-128"])
def test_the_cuda_kernel_equals_the_operator(site, library, dtype, dim, v_dim, masked, form, atol):
    settings = getattr(site, form)
    node = site.node(Variant(masked, True), settings)
    node.overload = ""
    runner = session(site.model([node], [], masked, dtype), library)
    for batch, q_len, k_len in [(1, 1, 1), (2, 48, 48), (3, 49, 49), (2, 513, 513), (2, 40, 900), (1, 3000, 3000)]:
        q, k, v = site.operands(batch, q_len, k_len, dim=dim, v_dim=v_dim, dtype=dtype)
        mask = site.ragged_mask(batch, k_len) if masked else None
        expected = operator(site, settings, *(x if x is None else x.cuda() for x in (q, k, v, mask)))
        actual = site.run(runner, q, k, v, mask)
        assert (actual.float() - expected.cpu().float()).abs().max() < atol, (batch, q_len, k_len)


def test_the_node_runs_on_the_gpu(site, library, tmp_path):
    from tsa_compile.tools.bench.onnx_cuda import placement

    node = site.node(Variant(False, True), site.paper)
    node.overload = ""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    runner = session(site.model([node], [], False, torch.float16), library, options)
    site.run(runner, *site.operands(1, 300, 300, dim=64, v_dim=64, dtype=torch.float16))
    nodes, _ = placement(Path(runner.end_profiling()))
    assert list(nodes) == [CUDA]
    assert list(nodes[CUDA]) == ["TokenSparseAttention"]


def test_a_form_that_was_not_built_is_named(site, library):
    node = site.node(Variant(False, True), site.paper)
    node.overload = ""
    runner = session(site.model([node], [], False, torch.float32), library)
    with pytest.raises(Exception, match=r"node 'site_out': .*without kernels for float32, head dims 64 and 64"):
        site.run(runner, *site.operands(1, 60, 60, dim=64, v_dim=64))


@pytest.mark.parametrize("strip", [False, True], ids=["paper", "completed"])
def test_the_ptx_of_the_tensorrt_plugins_runs_with_inputs_sizes_and_outputs(site, strip):
    """Through the driver, with exactly the arguments that TensorRT passes; the selection is the operator's."""
    import ctypes

    from tsa_compile.export.tensorrt_engine.plugin_ptx import compile_plugin

    s = site.strip if strip else site.paper
    q, k, v = (x.cuda() for x in site.operands(2, 700, 700, dim=64, v_dim=64, dtype=torch.float16))
    numbers = (site.scale, s["coverage"], s["window"], s["pool"], s["min_tokens"])
    indices, counts, heavy = torch.ops.tsa.select_tokens(q, k, None, None, *numbers, s["heavy"])
    driver = ctypes.CDLL("libcuda.so.1")

    def launch(name, inputs, sizes, outputs):
        settings = {"scale": site.scale, "window": s["strip_window"], "sinks": s["strip_sinks"]}
        kernel = compile_plugin(name, torch.float16, 64, 64, settings, torch.cuda.get_device_capability())
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        assert driver.cuModuleLoadData(ctypes.byref(module), kernel.ptx.encode()) == 0
        assert driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.entry.encode()) == 0
        assert driver.cuFuncSetAttribute(function, 8, kernel.shared) == 0
        pointers = [[ctypes.c_uint64(x.data_ptr()) for x in part] for part in (inputs, outputs)]
        arguments = [*pointers[0], *map(ctypes.c_int32, sizes), *pointers[1]]
        packed = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        programs = 8 * -(-700 // kernel.block_m)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        assert driver.cuLaunchKernel(function, programs, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, packed, None) == 0
        torch.cuda.synchronize()

    out, sizes = torch.full_like(q, float("nan")), [4, 2, 700, 700]
    if strip:
        part, lse = torch.full_like(q, float("nan")), torch.full((2, 4, 700), float("nan"), device="cuda")
        launch("sparse_prefill_lse", [q, k, v, indices, counts], sizes, [part, lse])
        slots = torch.full((2, 4, 700), -1, dtype=torch.int32, device="cuda")
        for b in range(2):
            n = int(counts[b])
            slots[b].scatter_(1, indices[b, :, :n].long(), torch.arange(n, dtype=torch.int32, device="cuda").expand(4, -1))
        launch("sparse_strip", [q, k, v, part, lse, slots, heavy], [*sizes, heavy.shape[2]], [out])
    else:
        launch("sparse_prefill", [q, k, v, indices, counts], sizes, [out])
    strip_numbers = (s["strip_window"], s["strip_sinks"], s["heavy"])
    expected = torch.ops.tsa.token_sparse_attention(q, k, v, None, *numbers, *strip_numbers, "reference")
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
