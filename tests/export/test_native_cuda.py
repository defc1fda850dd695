"""The CUDA half of `libtsa_ort.so` without a GPU.

The C++ launches run against a driver of the test's own (fake_driver.c), which hands each launch to Triton's interpreter:
kernels, argument order, grids, scratch sizes and strides are real, only the machine code is not. The machine code is
compiled, not run, in the last tests.
"""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("triton", reason="extra 'triton' is not installed")

from tsa_compile.export.common import ExportError  # noqa: E402
from tsa_compile.export.native import aot  # noqa: E402
from tsa_compile.export.native import library as native  # noqa: E402
from tsa_compile.export.native.aot_form import Form  # noqa: E402
from tsa_compile.export.native.aot_kernels import kernels_of  # noqa: E402
from tsa_compile.export.onnx_model.node import Variant  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("the interpreter is off where there is a GPU", allow_module_level=True)

DIM, V_DIM = 16, 32
POINTEES = {"fp32": torch.float32, "fp16": torch.float16, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8}
VALUES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)


CAPABILITY = (9, 0)  # the fake driver's; the host code takes it for tensors on the CPU


def forms(dtype):
    window = 16
    return [Form.of(dtype, DIM, V_DIM, window, masked, strip, group=2) for masked in (False, True) for strip in (False, True)]


def memory(address, triton_type):
    """A tensor at an address; the interpreter reads and writes through its pointer."""
    reach = 1 << 20  # kernels index from the pointer, whatever the tensor's size
    raw = (ctypes.c_char * reach).from_address(address or ctypes.addressof(NOTHING))
    return torch.frombuffer(raw, dtype=POINTEES[triton_type], count=1)


NOTHING = (ctypes.c_char * (1 << 20))()  # what null pointers to unread arguments become


class Machine:
    """Runs launches by Triton's interpreter, and remembers them."""

    def __init__(self):
        self.kernels, self.launched, self.error = {}, [], None
        self.callback = CALLBACK(self._launch)

    def _launch(self, entry, x, y, z, parameters):
        try:
            kernel = self.kernels[entry.decode()]
            self.launched.append((kernel.name, (x, y, z)))
            values = {}
            for i, (name, kind) in enumerate(kernel.types().items()):
                if kind.startswith("*"):
                    values[name] = memory(ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_uint64))[0], kind[1:])
                else:
                    values[name] = ctypes.cast(parameters[i], ctypes.POINTER(VALUES[kind]))[0]
            kernel.function[(x, y, z)](**values, **kernel.constants, **kernel.options)
            return 0
        except Exception as error:  # must not cross the C frames; the test raises it
            self.error = error
            return 1


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The library with images that only name their kernel, on the fake driver."""
    folder = tmp_path_factory.mktemp("cuda")
    driver = folder / "libcuda_fake.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(Path(__file__).parent / "fake_driver.c"), "-o", driver], check=True)
    machine, images = Machine(), []
    for dtype in (torch.float32, torch.float16):
        for form in [*forms(dtype), *(Form.of(dtype, 64, 64, 16, False, strip, group=2) for strip in (False, True))]:
            for kernel in kernels_of(form, CAPABILITY):
                entry = f"{kernel.name}_{len(images)}"
                machine.kernels[entry] = kernel
                images.append(aot.Image(kernel, CAPABILITY, b"-", entry, 0, 128))
    aot.write_images(images, folder)
    flags = [*native.FLAGS, "-DTSA_CUDA", "-DTSA_DEVICE_ON_HOST", f'-DTSA_DRIVER="{driver}"']
    machine.library = native.compile_sources(native.find_compiler(), flags, folder)
    ctypes.CDLL(str(driver)).fake_set_launch(machine.callback)
    return machine


def session(site, machine, settings, masked=False, dtype=torch.float32):
    node = site.node(Variant(masked, True), settings)
    node.overload = ""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(machine.library))
    model = site.model([node], [], masked, dtype).SerializeToString()
    machine.launched.clear()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def difference(site, machine, runner, *operands):
    machine.error = None
    try:
        return site.difference(runner, *operands)
    finally:
        if machine.error:
            raise machine.error


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("form", ["paper", "strip"])
def test_launches_equal_the_reference(site, machine, form, masked):
    settings = getattr(site, form)
    runner = session(site, machine, settings, masked)
    for batch, q_len, k_len, heads in [(1, 1, 1, 4), (2, 40, 40, 2), (2, 90, 90, 2), (1, 30, 140, 4)]:
        q, k, v = site.operands(batch, q_len, k_len, heads, heads // 2, DIM, V_DIM)
        mask = site.ragged_mask(batch, k_len) if masked else None
        assert difference(site, machine, runner, q, k, v, mask, settings) < 1e-4, (batch, q_len, k_len)


@pytest.fixture
def recorded(monkeypatch):
    """What is launched in place of running it: kernel, grid, and all it is given but memory and most strides."""
    from triton.runtime.interpreter import InterpretedFunction

    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        given = {"num_warps": 4, "num_stages": 3, **dict(zip(self.arg_names, args, strict=False)), **kwargs}
        single = {k: ctypes.c_float(v).value if isinstance(v, float) else v for k, v in given.items()}
        seen = {
            k: v
            for k, v in single.items()
            if not isinstance(v, torch.Tensor) and (k[1:3] != "_s" or k in ("q_sl", "k_sl", "v_sl"))
        }
        launches.append((self.__name__, (*grid, 1, 1)[:3], seen))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return launches


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("form", ["paper", "strip"])
@pytest.mark.parametrize(("batch", "q_len", "k_len"), [(2, 90, 1100), (1, 9000, 9000), (1, 60, 17000)])
def test_the_library_launches_what_the_host_code_launches(site, machine, recorded, form, masked, batch, q_len, k_len):
    """Same kernels, grids, numbers, constants and options, in the same order: `aot_kernels` and cuda.cc follow the host code."""
    from tsa_compile.kernels.attend.tokens.host import sparse_attention
    from tsa_compile.kernels.common.ranks import rank_order
    from tsa_compile.kernels.compose import select_tokens
    from tsa_compile.kernels.types import KvView, Operands, Strip, TokenRule

    s = getattr(site, form)
    q, k, v = site.operands(batch, q_len, k_len, dim=DIM, v_dim=V_DIM)
    mask = site.ragged_mask(batch, k_len) if masked else None
    x = Operands(q, k, v, view=KvView.ordered(*(rank_order(mask) if masked else (None, None))))
    rule = TokenRule(s["coverage"], s["window"], s["pool"], s["min_tokens"], s["heavy"])
    chosen, strip = select_tokens(x, site.scale, rule), Strip(s["strip_window"], s["strip_sinks"])
    sparse_attention(x, chosen, site.scale, strip, 48, "fused")
    host = list(recorded)
    if masked:  # rows of padding, which the library leaves zero
        assert host.pop()[0] == "padding_kernel"
    recorded.clear()
    site.run(session(site, machine, s, masked), q, k, v, mask)
    assert [launch for launch in recorded if launch[0] != "rank_kernel"] == host  # PyTorch's cumsum in the host code


@pytest.mark.parametrize("form", ["paper", "strip"])
@pytest.mark.parametrize(("batch", "length"), [(2, 1100), (1, 9000)])
def test_the_same_with_the_kernels_for_hopper(site, machine, recorded, monkeypatch, form, batch, length):
    """They do not run in the interpreter, so what is launched is compared, no more; heads of 64 in half precision."""
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.runtime.interpreter import InterpretedFunction

    from tests.kernels.flat import select_tokens, sparse_attention
    from tsa_compile.kernels.attend.tokens import hopper as prefill
    from tsa_compile.kernels.score.last_queries import hopper as scores

    monkeypatch.setattr(GluonJITFunction, "run", InterpretedFunction.run)
    for module in (prefill, scores):
        monkeypatch.setattr(module, "takes", lambda *_: True)
        monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(scores, "_run_at_once", lambda *_: False)  # the library launches the passes one by one
    s = getattr(site, form)
    q, k, v = site.operands(batch, length, length, dim=64, v_dim=64, dtype=torch.float16)
    chosen = select_tokens(q, k, None, site.scale, s["coverage"], s["window"], s["pool"], s["min_tokens"], s["heavy"])
    sparse_attention(q, k, v, *chosen, None, site.scale, s["strip_window"], s["strip_sinks"], 48, "fused")
    host = list(recorded)
    recorded.clear()
    site.run(session(site, machine, s, dtype=torch.float16), q, k, v)
    assert {"score_hopper_kernel", "sparse_prefill_hopper_kernel"} <= {name for name, *_ in host}
    assert list(recorded) == host


def test_half_precision(site, machine):
    runner = session(site, machine, site.strip, dtype=torch.float16)
    operands = site.operands(1, 90, 90, dim=DIM, v_dim=V_DIM, dtype=torch.float16)
    assert difference(site, machine, runner, *operands, None, site.strip) < 1e-2


def test_short_rows_are_not_scored(site, machine):
    runner = session(site, machine, site.paper)
    difference(site, machine, runner, *site.operands(1, 48, 48, dim=DIM, v_dim=V_DIM), None, site.paper)
    assert [name for name, _ in machine.launched] == ["select", "prefill"]
    machine.launched.clear()
    difference(site, machine, runner, *site.operands(1, 60, 60, dim=DIM, v_dim=V_DIM), None, site.paper)
    names = [name for name, _ in machine.launched]
    assert names == ["score_lse", "score_mean", "pool", "count", "select", "prefill"]


def test_a_form_that_was_not_built_is_named(site, machine):
    runner = session(site, machine, site.paper)
    message = r"node 'site_out': .*without kernels for float32, head dims 24 and 32, window 16"
    with pytest.raises(Exception, match=message):
        site.run(runner, *site.operands(1, 60, 60, dim=24, v_dim=32))


def test_a_failing_launch_is_quoted(site, machine, monkeypatch):
    runner = session(site, machine, site.paper)
    monkeypatch.setattr(machine, "kernels", {})
    with pytest.raises(Exception, match=r"node 'site_out': score_lse_\d+: the test's own error"):
        site.run(runner, *site.operands(1, 60, 60, dim=DIM, v_dim=V_DIM))


def test_forms_are_read_from_a_model(site, tmp_path):
    node = site.node(Variant(True, True), site.strip)
    node.overload = ""
    model = site.model([node], [], masked=True, dtype=torch.float16)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="node site_out: the file does not say its heads and head dims"):
        native.forms_of(tmp_path / "m.onnx")
    for name, heads, width in (("q", 8, 64), ("k", 2, 64), ("v", 2, 128)):
        value = next(i for i in model.graph.input if i.name == name)
        value.type.tensor_type.shape.dim[1].dim_value = heads
        value.type.tensor_type.shape.dim[3].dim_value = width
    onnx.save(model, tmp_path / "m.onnx")
    assert native.forms_of(tmp_path / "m.onnx") == [Form("fp16", 64, 128, 16, True, True, 4)]


@pytest.mark.slow
def test_machine_code_for_hopper_and_ptx_in_a_library_that_loads_without_a_gpu(site, tmp_path):
    """The kernels for Hopper replace the portable ones; without a driver the CPU kernel still works."""
    form = Form.of(torch.float16, 64, 64, 16, masked=False, strip=True, group=2)
    aot.run([form], [(9, 0)], tmp_path)
    header, blob = (tmp_path / "kernels.h").read_text(), (tmp_path / "kernels.bin").read_bytes()
    hopper, portable = ([k.name for k in kernels_of(form, c)] for c in ((9, 0), (8, 0)))
    assert {"prefill_hopper", "score_lse_hopper", "score_mean_hopper"} == set(hopper) - set(portable)
    for names, capability in ((hopper, 90), (portable, 0)):
        for name in names:
            assert f"{{Kernel::{name}, ort::kFloat16, 64, 64, 16, 0, 1, 2, {capability}," in header
    assert blob.count(b"\x7fELF") == len(hopper)
    assert blob.count(b".target sm_80") == len(portable)
    library = native.compile_sources(native.find_compiler(), [*native.FLAGS, "-DTSA_CUDA"], tmp_path)
    node = site.node(Variant(False, True), site.strip)
    node.overload = ""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    model = site.model([node], [], False, torch.float16).SerializeToString()
    runner = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    operands = site.operands(1, 90, 90, dim=64, v_dim=64, dtype=torch.float16)
    assert site.difference(runner, *operands, None, site.strip) < 1e-2
