"""Every public name, with its signature: the one table to look names up in.

A signature is its parameters with their defaults, without types. `...` at its end: more may follow.
A name in `COMING` is decided and not built yet. Who builds it takes it out of `COMING`; the test fails until then, and
also when a signature here and in the code differ.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tsa_compile as tsa

PLAN = (
    "prefill=None, decode=None, verify=None, draft=None, denoise_first=None, denoise=None, "
    "rules=(), reuse=None, where='always', notes={}, weights=None"
)

NAMES = {
    # Plans and policies: what to do. A policy is a frozen dataclass, and JSON.
    "Plan": PLAN,
    "Plan.bind": "self, model",  # names checked against the model's modules
    "Plan.policy_at": "self, module, phase, index=None",  # of one attention module, by its path
    "Plan.to_dict": "self",
    "Plan.from_dict": "data",
    "Plan.save": "self, path",
    "Plan.load": "path",
    "Dense": "",
    "Exact": "",  # decode, verify
    "TokenSparse": (
        "coverage=0.05, window=128, pool=7, min_tokens=1024, completion=Completion(window=256, sinks=4, heavy=256), "
        "share='head', inner=None, engine='auto', min_queries=128"
    ),
    "TokenSparse.paper": "coverage=0.005, **fields",  # as the paper has it: without completion
    "Completion": "window=256, sinks=4, heavy=256",
    "BlockSparse": "alpha=0.05, pool=128, window=256, sinks=4, last_dense=128, share='head', lookahead=True",
    "ContextParallel": (
        "inner=BlockSparse(alpha=0.05, pool=128, window=256, sinks=4, last_dense=128, share='head', lookahead=True), group=None"
    ),
    "Bridge": "block, w_t, w_s, offset=0",
    "Bridge.source_extended": "block, w_t, offset=0",  # bridges read the whole block before
    "Bridge.overlapping": "block, overlap, offset=0",  # every row reads so many tokens before its block
    "ProbeSparse": "coverage=0.05, probes=64, min_keys=256",
    "PageSparse": "keep=None, kind='mean', completion=False, pages=None, mass=None, schedule=None, ...",
    "HeadSplit": "retrieval, keep=1.0, sinks=4, window=8192, mass=None",
    "SampledValues": "samples, form='prop', representatives=4, recent=4",
    "Remembered": "source, keys=None, ratio=None, dense_layers=None, queries=None, share='kv_head'",
    "Resident": "keep=None, pages=None, interval=64, layers=None, ensemble='max', sinks=1, recent=4, strict=False, sample=0, "
    "index='mean', threshold=None",
    "Routed": "inner=Exact(), group=None, link=None, steps=256",
    # What is done to a model.
    "transform": (
        "model, policy_or_plan=None, *, compiler='eager', fullgraph=False, inductor_options=None, front='auto', warm=False"
    ),
    "warm": "model, max_batch=8, max_tokens=None, inputs=None, console=None",
    "restore": "model",
    "report": "model",  # a transformed model, or what torch.compile(..., backend="tsa") gave
    "explain": "model, *args, policy=None, **kwargs",
    "compare": "model, *args, policy=None, repeats=3, last=128, compiler='eager', **kwargs",
    "calibrate": (
        "model, prompts, target='kl<=0.01', *, policy=None, coverages=None, alphas=None, keeps=None, method='loss', last=128, "
        "state=None, progress=True"
    ),
    "generate": "model, *args, draft=None, gamma=None, costs=None, **kwargs",
    "speculative": "draft, gamma=None, *, costs=None, streamer=None",  # for `generate(custom_generate=...)` of transformers
    "reach": "model, plan, length, *args, phase='prefill', **kwargs",
    "Cache": "model, batch, max_length, pool=None",  # for transformers' `generate()`: room from the start
    "Report": "...",
    # What the parts of the compiler call each other by.
    "session.Session": "model, plan, compiler='eager', inductor_options=None, fullgraph=False, any_length=True",
    "backend.Backend": "plan, compiler='inductor', inductor_options=None, model=None",
    "backend.Backend.sites": "self",  # [SiteReport] of the current plan
    "recorder.record_kept": "model=None, group=None",
    "generate.diffusion.diffuse": (
        "model, ids, new_tokens, *, mask_id, block=32, steps=None, threshold=None, part=None, shifted=False, stop_id=None, "
        "plan=None, temperature=0.0, watch=None"
    ),
    "policies.base.Policy.refuse": "self, site",
    "policies.base.Policy.guaranteed": "self, site",
    "policies.base.Policy.select": "self, emit, site, state",
    "policies.base.Policy.attend": "self, emit, site, selection",
    "kernels.types.KvView": "blocks, block, start, lengths, ranks=None",
    "kernels.types.Operands": (
        "q, k, v, key_mask=None, view=KvView(blocks=None, block=1, start=None, lengths=None, ranks=None), mask=None, sinks=None"
    ),
    "kernels.types.Attended": "out, lse",
}
COMING = {}
# Of code, by folder: identifiers that mean something else there. `window` is the sliding one, the last keys that a row reads. How
# many last queries score keys is `last_queries`: the field of `TokenSparse` and the operators' argument are called `window`, too,
# as saved plans and exported files have these names.
NOT_IN = {"kernels/score/last_queries": {"window"}, "kernels/select/tokens": {"window"}}
ONE_FILE = ("check.py", "checks.py", "command.py", "ops.py", "site.py", "trace.py", "view.py")
PHASES = ("prefill", "decode", "verify", "draft", "denoise_first", "denoise")


ROOT = Path(__file__).parents[2]
FILES = [path for top in ("tsa_compile", "passes", "kernels", "export") for path in sorted((ROOT / top).rglob("*.py"))]


def find(name: str) -> Any:
    """The object called `name`: at top level, or `module.Class.method` below tsa_compile; None if there is none."""
    first, *rest = name.split(".")
    is_module = bool(rest) and not first[0].isupper()
    if not is_module and hasattr(tsa, first) and first in tsa.__all__:
        found: Any = getattr(tsa, first)
    else:
        parts = name.split(".")
        cut = next(i for i, part in enumerate(parts) if part[0].isupper() or i == len(parts) - 1)
        try:
            found = importlib.import_module(".".join(["tsa_compile", *parts[:cut]])) if cut else None
        except ModuleNotFoundError:
            return None
        rest = parts[cut:]
    for part in rest:
        found = getattr(found, part, None)
    return found


def signature(found: Any) -> str:
    """Parameters with defaults, without types; a dataclass's default factory is shown by what it makes."""
    fields = getattr(found, "__dataclass_fields__", {})
    shown = []
    for name, p in inspect.signature(found).parameters.items():
        factory = getattr(fields.get(name), "default_factory", None)
        default = factory() if callable(factory) else p.default
        shown.append(p.replace(annotation=inspect.Parameter.empty, default=default))
    return str(inspect.Signature(shown))[1:-1]


def agrees(wanted: str, actual: str) -> bool:
    if not wanted.endswith("..."):
        return actual == wanted
    head = wanted.removesuffix("...").removesuffix(", ")
    return not head or actual == head or actual.startswith(f"{head}, ") or actual.startswith(f"{head}=")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_its_signature(name):
    found = find(name)
    actual = None if found is None else signature(found)
    done = actual is not None and agrees(NAMES[name], actual)
    if name in COMING:
        assert not done, f"{name} exists: take it out of COMING"
    else:
        assert done, f"{name}({actual}) is not {name}({NAMES[name]})"


def test_every_public_name_is_in_the_table():
    assert set(tsa.__all__) <= set(NAMES)
    assert set(COMING) <= set(NAMES)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    yield from ((path, node) for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("folder", NOT_IN)
def test_a_word_means_one_thing(folder):
    """Names of variables, arguments and attributes."""
    paths = [path for path in FILES if path.parent == ROOT / folder]
    assert paths
    for path in paths:
        found = {getattr(node, field, None) for node in ast.walk(tree(path)) for field in ("id", "arg", "attr")}
        assert not NOT_IN[folder] & found, path


def test_no_two_files_of_one_name_hold_different_things():
    for name in ONE_FILE:
        assert len([path for path in FILES if path.name == name]) <= 1, name
    assert all(path.is_relative_to(ROOT / "kernels") for path in FILES if path.name == "reference.py")


def test_what_is_called_check_raises():
    """By itself, by another check, or as its docstring says. What gives back what it found has another name."""

    def is_check(name: str) -> bool:
        return name.strip("_") == "check" or name.strip("_").startswith("check_")

    def raises(node: ast.AST) -> bool:
        says = isinstance(node, ast.Constant) and isinstance(node.value, str) and "Raises:" in node.value
        called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        return says or is_check(called) or isinstance(node, ast.Raise)

    for path, function in functions():
        if is_check(function.name):
            assert any(raises(node) for node in ast.walk(function)), f"{path}: {function.name}"


def test_no_function_has_a_twin():
    """The same lines twice, in whatever files, are one function."""
    seen = {}
    for path, function in functions():
        body = function.body[ast.get_docstring(function, clean=False) is not None :]
        if body:
            lines = path.read_text().splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
            text, where = textwrap.dedent("\n".join(lines)), f"{path.relative_to(ROOT)}: {function.name}"
            assert len(text) < 120 or text not in seen, f"{where} is {seen.get(text)}"
            seen[text] = where
