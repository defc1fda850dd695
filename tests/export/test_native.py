"""`libtsa_ort.so`: built here, registered with the installed ONNX Runtime, compared with the reference; its errors."""

import ctypes
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")

from tsa_compile.export.common import ExportError  # noqa: E402
from tsa_compile.export.native import library as native  # noqa: E402
from tsa_compile.export.onnx_model.node import Variant  # noqa: E402
from tsa_compile.export.onnx_model.run_onnx import make_session  # noqa: E402


@pytest.fixture(scope="module")
def library():
    return native.build_library()


def custom(site, settings, masked=False, dtype=torch.float32, **changes):
    """A model of one node without a body; `changes` replaces attributes, None removes one."""
    node = site.node(Variant(masked, True), {**settings, **{n: v for n, v in changes.items() if v is not None}})
    node.overload = ""
    for attribute in [a for a in node.attribute if changes.get(a.name, "") is None]:
        node.attribute.remove(attribute)
    return site.model([node], [], masked, dtype)


def session(model, library):
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["paper", "strip"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.float16, 4e-3)], ids=["fp32", "fp16"])
def test_cpu_kernel_equals_the_reference(site, library, dtype, atol, form, masked):
    settings = getattr(site, form)
    runner = session(custom(site, settings, masked, dtype), library)
    for batch, q_len, k_len in [(1, 1, 1), (2, 7, 7), (3, 49, 49), (2, 513, 513), (2, 40, 200), (1, 5, 130)]:
        q, k, v = site.operands(batch, q_len, k_len, dtype=dtype)
        mask = site.ragged_mask(batch, k_len) if masked else None
        assert site.difference(runner, q, k, v, mask, settings) < atol, (batch, q_len, k_len)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_score_that_is_not_finite_counts_as_zero(site, library, value):
    runner = session(custom(site, site.strip), library)
    assert site.difference_beside_a_bad_head(runner, site.strip, value) < 2e-5


def test_bfloat16_rounds_as_torch_does(site, library):
    """Inputs and output pass through Cast, since numpy has no bfloat16."""
    model = custom(site, site.strip)
    node = model.graph.node[0]
    cast = onnx.helper.make_node
    model.graph.node.remove(node)
    renamed = onnx.helper.make_node(
        node.op_type, ["qb", "kb", "vb"], ["ob"], name="site", domain=node.domain, **site.attributes(site.strip)
    )
    for attribute in [a for a in renamed.attribute if a.name == "coverage_q56"]:
        renamed.attribute.remove(attribute)
    casts = [cast("Cast", [n], [f"{n}b"], to=onnx.TensorProto.BFLOAT16) for n in "qkv"]
    model.graph.node.extend([*casts, renamed, cast("Cast", ["ob"], ["out"], to=onnx.TensorProto.FLOAT)])
    q, k, v = site.operands(2, 130, 130, dtype=torch.bfloat16)
    actual = site.run(session(model, library), q.float(), k.float(), v.float())
    s = site.strip
    expected = torch.ops.tsa.token_sparse_attention(
        q, k, v, None, site.scale, s["coverage"], s["window"], s["pool"], s["min_tokens"], s["strip_window"],
        s["strip_sinks"], s["heavy"], "reference",
    )  # fmt: skip
    assert torch.equal(actual, actual.bfloat16().float())
    assert (actual - expected.float()).abs().max() < 2e-2


def test_the_kernel_is_used_instead_of_the_body(site, library, tmp_path):
    """With the library registered, a node of the plain variant is not inlined; without it, it is."""
    model = site.portable(Variant(False, False), site.paper)
    for name in ("strip_window", "strip_sinks", "heavy"):
        model.graph.node[0].attribute.append(onnx.helper.make_attribute(name, 0))
    profile = {}
    for registered in (False, True):
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        if registered:
            options.register_custom_ops_library(str(library))
        runner = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        site.run(runner, *site.operands(1, 60, 60))
        file = runner.end_profiling()
        with open(file) as f:
            profile[registered] = "TokenSparseAttention" in re.findall(r'"op_name"\s*:\s*"(\w+)"', f.read())
    assert profile == {False: False, True: True}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)], r"query heads \(3\) must be a multiple of KV heads \(2\)"),
        ([(1, 4, 9, 16), (1, 2, 8, 16), (1, 2, 8, 16)], r"more queries \(9\) than keys \(8\)"),
        ([(1, 4, 8, 16), (1, 2, 8, 12), (1, 2, 8, 16)], "q and k differ in head dim"),
        ([(1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 7, 16)], "k and v differ in heads or length"),
        ([(2, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)], "batch sizes differ"),
    ],
)
def test_operands_that_do_not_fit_name_the_node(site, library, shapes, message):
    runner = session(custom(site, site.paper), library)
    with pytest.raises(Exception, match=f"node 'site_out': {message}"):
        site.run(runner, *(torch.zeros(shape) for shape in shapes))


def test_a_wrong_rank_names_the_node(site, library):
    model = custom(site, site.paper)
    model.graph.input[0].type.tensor_type.shape.dim.pop()
    with pytest.raises(Exception, match="node 'site_out': q must have rank 4, got 3"):
        site.run(session(model, library), torch.zeros(4, 8, 16), torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16))


def test_a_mask_that_does_not_fit_names_the_node(site, library):
    runner = session(custom(site, site.paper, masked=True), library)
    q, k, v = site.operands(2, 8, 8)
    with pytest.raises(Exception, match=r"node 'site_out': key_mask must be \[batch, keys\] = \[2, 8\], got \[2, 7\]"):
        site.run(runner, q, k, v, torch.ones(2, 7, dtype=torch.bool))


def test_operands_of_different_dtypes_are_refused(site, library):
    model = custom(site, site.paper)
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(Exception, match="site_out"):
        session(model, library)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": 4}, "pool odd"),
        ({"window": 0}, "window and min_tokens must be positive"),
        ({"heavy": 33}, "heavy must not exceed min_tokens"),
        ({"strip_window": -1}, "strip_window must not be negative, got -1"),
        ({"coverage": 1.5}, r"coverage must be in \[0, 1\)"),
        ({"scale": None}, "scale"),
        ({"coverage": None}, "coverage"),
        ({"heavy": None}, "heavy"),
    ],
    ids=str,
)
def test_bad_attributes_name_the_node(site, library, change, message):
    with pytest.raises(Exception, match=f"node 'site_out'.*{message}"):
        session(custom(site, site.paper, **change), library)


def test_a_session_without_the_library_is_told_what_to_pass(site, tmp_path):
    onnx.save(custom(site, site.paper), tmp_path / "custom.onnx")
    with pytest.raises(ExportError, match=r"nodes site_out .* no portable body; pass library="):
        make_session(tmp_path / "custom.onnx")


def test_missing_and_damaged_files(site, library, tmp_path):
    good, bad, empty = (tmp_path / name for name in ("good.onnx", "bad.onnx", "empty.onnx"))
    onnx.save(custom(site, site.paper), good)
    bad.write_bytes(good.read_bytes()[:200])
    empty.write_bytes(b"")
    with pytest.raises(ExportError, match="no such file"):
        make_session(tmp_path / "none.onnx")
    for file in (bad, empty):
        with pytest.raises(ExportError, match="damaged"):
            make_session(file, library=library)
    make_session(good, library=library)


def test_missing_and_damaged_libraries(site, library, tmp_path):
    model, broken = tmp_path / "good.onnx", tmp_path / "libtsa_ort.so"
    onnx.save(custom(site, site.paper), model)
    with pytest.raises(ExportError, match="cannot read the operator library"):
        make_session(model, library=broken)
    for data, message in [(b"text", "not a shared library"), (library.read_bytes()[:5000], "damaged: 5000 bytes")]:
        broken.write_bytes(data)
        with pytest.raises(ExportError, match=message):
            make_session(model, library=broken)


def test_a_provider_that_is_not_there(site, library, tmp_path):
    onnx.save(custom(site, site.paper), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="has no NoSuchProvider"):
        make_session(tmp_path / "m.onnx", library=library, providers=["NoSuchProvider"])


def test_an_old_onnxruntime_is_refused(library):
    """RegisterCustomOps is given a runtime whose newest API is older than the library's."""
    said = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: said.append((code, text.decode())) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda v: ctypes.addressof(table) if v == 1 else None)
    get_version = ctypes.CFUNCTYPE(ctypes.c_char_p)(lambda: b"1.9.0")

    class ApiBase(ctypes.Structure):
        _fields_ = [("GetApi", type(get_api)), ("GetVersionString", type(get_version))]

    loaded = ctypes.CDLL(str(library))
    loaded.RegisterCustomOps.restype = ctypes.c_void_p
    assert loaded.RegisterCustomOps(None, ctypes.byref(ApiBase(get_api, get_version)))
    assert said == [(1, "libtsa_ort needs ONNX Runtime 1.17 or newer; this is 1.9.0")]


def test_sessions_that_register_at_once_share_one_domain(library, tmp_path):
    """Threads meet in a fresh copy of the library; a runtime of the test's own counts what it is asked for."""
    seen, pointer, index = [], ctypes.c_void_p, {"create": 26, "add": 27, "use": 28}
    kinds = {"create": (ctypes.c_char_p, ctypes.POINTER(pointer)), "add": (pointer, pointer), "use": (pointer, pointer)}

    def answer(name):
        def called(first, second):
            time.sleep(0.01)  # others come in meanwhile
            seen.append((name, second if name == "add" else first))
            if name == "create":
                second[0] = len(seen)
            return None

        return ctypes.CFUNCTYPE(pointer, *kinds[name])(called)

    answers = {name: answer(name) for name in index}
    table = (pointer * 300)()
    for name, function in answers.items():
        table[index[name]] = ctypes.cast(function, pointer)
    get_api = ctypes.CFUNCTYPE(pointer, ctypes.c_uint32)(lambda _: ctypes.addressof(table))
    base = (pointer * 2)(ctypes.cast(get_api, pointer))
    loaded = ctypes.CDLL(str(shutil.copy(library, tmp_path)))
    loaded.RegisterCustomOps.restype = pointer
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: loaded.RegisterCustomOps(None, base), range(8))) == [None] * 8
    names = [name for name, _ in seen]
    assert (names.count("create"), names.count("add"), names.count("use")) == (1, 6, 8)
    assert len({operator for name, operator in seen if name == "add"}) == 6


def test_builds_are_cached_and_follow_the_sources(library, monkeypatch, tmp_path):
    before = library.stat().st_mtime_ns
    assert native.build_library() == library
    assert library.stat().st_mtime_ns == before
    monkeypatch.setenv("TSA_COMPILE_CACHE", str(tmp_path))
    assert native.cache_dir() == tmp_path


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ExportError, match=r"none of c\+\+, g\+\+, clang\+\+ is on PATH.*apt install g\+\+"):
        native.build_library()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such header >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TSA_COMPILE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ExportError, match="failed:\nno such header"):
        native.build_library()
    assert not list((tmp_path / "cache").rglob("*.so"))
