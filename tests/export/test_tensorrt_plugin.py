"""Plugins for full TensorRT and Torch-TensorRT, as far as a machine without their libraries allows.

The kernels run through Triton's interpreter on what the exported graph itself selects; their PTX is compiled and assembled;
registration runs against a stand-in that holds TensorRT's rules. No engine is built here: docs/export.md says what to run.
"""

import json
import re
import subprocess
import sys
import types

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="extra 'onnx' is not installed")
ort = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="extra 'onnx' is not installed")
pytest.importorskip("triton", reason="extra 'triton' is not installed")

import tsa_compile as tsa  # noqa: E402
from tests.export.test_aoti import SHAPES, Block  # noqa: E402
from tsa_compile import export  # noqa: E402
from tsa_compile.export import torch_tensorrt_model  # noqa: E402
from tsa_compile.export.native import aot  # noqa: E402
from tsa_compile.export.native.aot_form import parameters  # noqa: E402
from tsa_compile.export.onnx_model.node import Variant  # noqa: E402
from tsa_compile.export.tensorrt_engine import plugin as tensorrt_plugin  # noqa: E402
from tsa_compile.export.tensorrt_engine.engine import load_runtime  # noqa: E402
from tsa_compile.export.tensorrt_engine.plugin_ptx import PluginKernel, plugin_constants, plugin_function, without_scratch  # noqa: E402

OUTPUTS = {"sparse_prefill": ("out",), "sparse_prefill_lse": ("out", "lse"), "sparse_strip": ("out",)}


# ---- the chain: selection by the exported graph, attention by the plugins' kernels


def selection(site, settings, strip, operands):
    """What the graph gives its plugins after q, k and v, by ONNX Runtime: one list for each plugin."""
    from onnx.inliner import inline_local_functions

    model = site.portable(Variant(False, strip, "tensorrt_plugin"), settings)
    model.opset_import.append(onnx.helper.make_opsetid("tsa", 1))
    for f in model.functions:
        f.opset_import.append(onnx.helper.make_opsetid("tsa", 1))
    model = inline_local_functions(model)
    plugins = [n for n in model.graph.node if n.domain == "tsa"]
    made = {name for n in plugins for name in n.output}
    wanted = [name for n in plugins for name in n.input[3:] if name not in made]
    nodes = [n for n in model.graph.node if n.domain != "tsa" and n.output[0] not in ("out",)]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 6, None) for name in wanted)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(None, {n: x.numpy() for n, x in zip("qkv", operands, strict=True)})
    return [torch.from_numpy(x) for x in values], [(n.op_type, {a.name: a.f or a.i for a in n.attribute}) for n in plugins]


def run_plugin(name, settings, inputs, outputs):
    """Launch as TensorRT would: inputs, sizes, outputs, in the kernel's own order."""
    q, k, v = inputs[:3]
    constants, options = plugin_constants(name, q.dtype, q.shape[3], v.shape[3], settings, (9, 0))
    batch, heads, q_len, _ = q.shape
    sizes = [heads, k.shape[1], q_len, k.shape[2]] + ([inputs[6].shape[2]] if name == "sparse_strip" else [])
    blocks = lambda n: -(-n // constants["BLOCK_M"])  # noqa: E731
    tiles = min(blocks(k.shape[2]), blocks(q_len) + 1)
    grid = (blocks(q_len) * batch * heads,) if name == "sparse_strip" else (batch * heads * tiles,)
    plugin_function(name)[grid](*inputs, *sizes, *outputs, **constants, **options)


@pytest.mark.parametrize(("q_len", "k_len"), [(90, 90), (40, 200), (48, 48)])
@pytest.mark.parametrize("strip", [False, True], ids=["paper", "completed"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_the_chain_equals_the_reference(site, strip, q_len, k_len):
    s = site.strip if strip else site.paper
    q, k, v = site.operands(2, q_len, k_len, v_dim=32)
    values, plugins = selection(site, s, strip, (q, k, v))
    out, lse = torch.full((2, 4, q_len, 32), float("nan")), torch.full((2, 4, q_len), float("nan"))
    if strip:
        (first, scale), (second, settings) = plugins
        run_plugin(first, scale, [q, k, v, *values[:2]], [out, lse])
        final = torch.full_like(out, float("nan"))
        run_plugin(second, settings, [q, k, v, out, lse, *values[2:]], [final])
        out = final
    else:
        run_plugin(*plugins[0], [q, k, v, *values], [out])
    numbers = (
        site.scale,
        s["coverage"],
        s["window"],
        s["pool"],
        s["min_tokens"],
        s["strip_window"],
        s["strip_sinks"],
        s["heavy"],
    )
    expected = torch.ops.tsa.token_sparse_attention(q, k, v, None, *numbers, "reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


def test_masked_sites_are_refused(site):
    with pytest.raises(export.ExportError, match="plugins take sites without a key mask"):
        site.portable(Variant(True, False, "tensorrt_plugin"), site.paper)


def test_tensorrt_rtx_has_no_plugins(tmp_path):
    try:
        load_runtime("tensorrt_rtx")
    except ImportError as error:
        pytest.skip(str(error))
    path = tmp_path / "m.onnx"
    policy = tsa.TokenSparse.paper(coverage=0.3, window=16, min_tokens=32)
    export.onnx(Block(), (torch.randn(2, 60, 64),), path, policy=policy, dynamic_shapes=SHAPES, target="tensorrt_plugin")
    nodes = [n for n in onnx.load(path).graph.node if n.domain == "tsa"]
    assert [n.op_type for n in nodes] == ["sparse_prefill"]
    with pytest.raises(export.ExportError, match="tensorrt_rtx has no plugins"):
        export.tensorrt(path, None, tmp_path / "e", profile={})
    with pytest.raises(ValueError, match="plugins=True is for runtime 'tensorrt'"):
        export.tensorrt(path, None, tmp_path / "e", profile={}, plugins=True)


# ---- PTX


@pytest.fixture(scope="module")
def compiled():
    """Each plugin's kernel, compiled in a process without the interpreter, and assembled by Triton's ptxas."""
    code = """
import json, subprocess, sys, tempfile, torch, triton
from tsa_compile.export.tensorrt_engine.plugin import PLUGINS
from tsa_compile.export.tensorrt_engine.plugin_ptx import compile_plugin
settings = {"scale": 0.125, "window": 24, "sinks": 4}
made = {name: compile_plugin(name, torch.float16, 64, 64, settings, (8, 0)) for name in PLUGINS}
for kernel in made.values():
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(kernel.ptx), f.flush()
        subprocess.run([triton.knobs.nvidia.ptxas.path, "-arch=sm_80", f.name, "-o", "/dev/null"], check=True)
json.dump(made, sys.stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=aot._environment())
    assert done.returncode == 0, done.stderr
    return {name: PluginKernel(*fields) for name, fields in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", tensorrt_plugin.PLUGINS)
def test_ptx_takes_inputs_sizes_and_outputs_only(compiled, name):
    kernel = compiled[name]
    declared = re.search(r"\.entry \w+\((.*?)\)", kernel.ptx, re.DOTALL).group(1)
    kinds = ["u64" if ".u64" in line else "u32" for line in declared.strip().splitlines()]
    inputs, outputs = {"sparse_strip": 7}.get(name, 5), len(OUTPUTS[name])
    sizes = 5 if name == "sparse_strip" else 4
    assert kinds == ["u64"] * inputs + ["u32"] * sizes + ["u64"] * outputs
    assert kernel.threads % 32 == 0
    assert kernel.shared <= 99 * 1024  # what every GPU of compute capability 8.0 or later gives a program


def test_ptx_that_reads_scratch_memory_is_refused(compiled):
    text = ".visible .entry f(\n.param .u64 f_param_0,\n.param .u64 f_param_1,\n.param .u64 f_param_2\n) { [f_param_2] }"
    with pytest.raises(export.ExportError, match="reads Triton's scratch parameter f_param_2"):
        without_scratch(text, "f", 1)
    with pytest.raises(export.ExportError, match="3 parameters in the PTX, expected 2"):
        without_scratch(text, "f", 2)


# ---- registration


class Expression(int):
    """A size expression of the stand-in; always constant."""

    is_constant = True

    def constant_value(self):
        return int(self)


class Desc:
    def __init__(self, shape, dtype="HALF"):
        self.shape_expr, self.dtype = tuple(map(Expression, shape)), types.SimpleNamespace(name=dtype)


@pytest.fixture
def trtp(monkeypatch):
    """`tensorrt.plugin` with the rules of release 11.4: annotations are types, names and order agree between the functions."""
    import inspect

    module, registered = types.ModuleType("tensorrt.plugin"), {}
    module.TensorDesc, module.KernelLaunchParams, module.AutoTuneCombination = Desc, dict, lambda *a: a
    module.SymIntExprs = type("SymIntExprs", (tuple,), {"from_tuple": classmethod(lambda cls, x: cls(x))})
    module.cdiv, module.min = (lambda a, b: Expression(-(-a // b))), min
    module.from_shape_expr = lambda shape, dtype: (shape, dtype)

    def register(name):
        def wrap(f):
            told = inspect.signature(f)
            kinds = [p.annotation for p in told.parameters.values()]
            assert all(k is Desc or k in (int, float) for k in kinds)
            assert kinds == sorted(kinds, key=lambda k: k is not Desc), "attributes come after tensors"
            assert all(a is Desc for a in told.return_annotation.__args__)
            registered[name] = {"describe": f, "names": list(told.parameters)}
            return f

        return wrap

    def part(kind, tail):
        def outer(name):
            def wrap(f):
                names, told = registered[name]["names"], inspect.signature(f)
                tensors = [n for n in names if registered[name]["describe"].__annotations__[n] is Desc]
                attributes = [] if kind == "autotune" else names[len(tensors) :]
                assert list(told.parameters) == [*tensors, *attributes, *tail]
                assert len(told.return_annotation.__args__) == (4 if kind == "aot_impl" else 1)
                registered[name][kind] = f
                return f

            return wrap

        return outer

    module.register, module.registered = register, registered
    module.autotune, module.aot_impl = part("autotune", ["outputs"]), part("aot_impl", ["outputs", "tactic"])
    tensorrt = types.ModuleType("tensorrt")
    tensorrt.DataType = types.SimpleNamespace(FLOAT="FLOAT")
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    return module


@pytest.mark.parametrize("name", tensorrt_plugin.PLUGINS)
def test_registration_and_launch(trtp, compiled, monkeypatch, name):
    """Types, grid and sizes for q [2, 8, 300, 64], k [2, 4, 500, 64]; sizes and tensors stand where the kernel has them."""
    seen = []
    monkeypatch.setattr(tensorrt_plugin, "compile_plugin", lambda *a: seen.append(a) or compiled[name])
    tensorrt_plugin.register_plugins(trtp)
    tensorrt_plugin.register_plugins(trtp)
    assert list(trtp.registered) == [f"tsa::{n}" for n in tensorrt_plugin.PLUGINS]
    q, k, index = Desc((2, 8, 300, 64)), Desc((2, 4, 500, 64)), Desc((2, 8, 500), "INT32")
    lse, heavy, counts = Desc((2, 8, 300), "FLOAT"), Desc((2, 8, 20), "INT32"), Desc((2,), "INT32")
    inputs = [q, k, k, q, lse, index, heavy] if name == "sparse_strip" else [q, k, k, index, counts]
    settings = {"scale": 0.125, "window": 24, "sinks": 4} if name == "sparse_strip" else {"scale": 0.125}
    plugin = trtp.registered[f"tsa::{name}"]
    described = plugin["describe"](*inputs, **settings)
    assert described[0] == ((2, 8, 300, 64), q.dtype)
    assert len(described) == len(OUTPUTS[name])
    (combination,) = plugin["autotune"](*inputs, outputs=described)
    assert len(combination[0].split(",")) == len(combination[1].split(",")) == len(inputs) + len(described)
    entry, ptx, launch, sizes = plugin["aot_impl"](*inputs, *settings.values(), described, 0)
    assert f".entry {entry}(" in ptx
    assert seen[0][:5] == (name, torch.float16, 64, 64, settings)
    rows = compiled[name].block_m
    grid = (16 * (-(-300 // rows) if name == "sparse_strip" else min(-(-500 // rows), -(-300 // rows) + 1)), 1)
    assert (launch["grid_x"], launch["grid_y"]) == grid
    assert list(sizes) == [8, 4, 300, 500, 20][: len(sizes)]
    names = parameters(plugin_function(name))
    tensors = [n for n in plugin["names"] if n not in settings]
    size_names = ["heads", "kv_heads", "q_len", "k_len", "heavy"][: len(sizes)]
    assert names[: len(tensors) + len(sizes) + len(described)] == [*tensors, *size_names, *OUTPUTS[name]]


def test_a_dtype_without_plugins_is_named(trtp):
    tensorrt_plugin.register_plugins(trtp)
    x = Desc((1, 2, 8, 16), "INT8")
    with pytest.raises(export.ExportError, match="float32, float16 and bfloat16, not INT8"):
        trtp.registered["tsa::sparse_prefill"]["autotune"](x, x, x, x, x, outputs=())


# ---- Torch-TensorRT


def test_torch_tensorrt_gets_an_operator_that_its_plugin_generator_takes(monkeypatch, tmp_path):
    """Its generator (2.14) handles Tensor, float, int, bool and str arguments of the default overload, and needs a fake."""
    calls, module = [], types.ModuleType("torch_tensorrt")
    plugins = types.ModuleType("torch_tensorrt.dynamo.conversion.plugins")
    plugins.custom_op = lambda name, **options: calls.append((name, options))
    module.dynamo = types.SimpleNamespace(compile=lambda program, **_: program)
    module.save = lambda program, path, **_: torch.export.save(program, path)
    module.__version__, module._tsa_lowered = "2.14.0", True
    module.ENABLED_FEATURES = types.SimpleNamespace(qdp_plugin=True)  # full TensorRT
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo.conversion.plugins", plugins)
    policy = tsa.TokenSparse(coverage=0.3, window=16, min_tokens=32, completion=tsa.Completion(24, 4, 20))
    model, example = Block().eval(), (torch.randn(2, 100, 64),)
    path = export.torch_tensorrt(model, example, tmp_path / "m.pt2", policy=policy, dynamic_shapes=SHAPES)
    assert calls == [(torch_tensorrt_model.OPERATOR, {"supports_dynamic_shapes": True})]
    schema = torch.ops.tsa.unmasked_token_sparse_attention._schemas[""]
    assert {str(a.type) for a in schema.arguments} == {"Tensor", "float", "int", "str"}
    x = torch.randn(3, 200, 64)
    with torch.no_grad():
        actual = torch.export.load(path).module()(x)
        expected = export_trace(model, example, policy)(x)
    torch.testing.assert_close(actual, expected)


def export_trace(model, example, policy):
    from tsa_compile.export.trace import trace

    return trace(model, example, policy=policy, dynamic_shapes=SHAPES).program.module()
