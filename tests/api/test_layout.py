"""The folders: who may import whom, what must import without the optional packages, and the package called `kernels`."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPS = ("tsa_compile", "passes", "kernels", "export")
# Lowest first. A part may import parts of the rows above its own, and itself; never a neighbour in its row.
ROWS = (
    ("kernels", "progress"),
    ("site", "cache"),
    ("policies",),
    ("passes", "plan"),
    ("dynamo",),
    ("recorder", "report", "watched", "first_call", "parallel", "prompt_masks"),
    ("backend", "interface"),
    ("session",),
    ("warm_up",),
    ("api",),
    ("check", "reach"),
    ("generate", "learn", "export", "frontends"),
    ("rl",),
    ("tools",),
    ("top",),  # what users start from: the package, and every command (`*cli.py`)
)
PART_OF = {
    "rules": "plan",
    "plan_format": "plan",
    "reuse": "plan",
    "plan_states": "plan",
    "index_weights": "plan",
    "pays": "plan",
    "owners": "backend",
    "traced": "backend",
    "static_caches": "backend",
    "entry_point": "backend",
    "speculation": "report",
    "step_loop": "session",
    "steps": "session",
    "partial_steps": "session",
    "default_decode": "session",
    "fixed_steps": "session",
    "call_rows": "session",
    "context_calls": "session",
    "context_model": "session",
    "context_parts": "session",
    "model_state": "session",
    "refuse_traces": "session",
    "cuda_graphs": "session",
}
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
OPTIONAL = (
    "triton",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "flash_attn",
    "vllm",
)


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, inside a function or a TYPE_CHECKING block) for every import of a file."""
    return list(below(ast.parse(path.read_text()), False))


def below(parent: ast.AST, lazy: bool):
    """`imports` of a statement's blocks."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.Import):
            yield from ((a.name, lazy) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            if node.module == "tsa_compile":
                yield from ((f"tsa_compile.{a.name}", lazy) for a in node.names if a.name != "__version__")
            else:
                yield node.module, lazy
        elif isinstance(node, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            yield from below(node, lazy or isinstance(node, (ast.FunctionDef, ast.If)))


def part_of(module: str) -> str:
    """The part of `ROWS` that a module belongs to."""
    names = module.split(".")
    if len(names) == 1 or names[1].startswith("__") or names[-1].endswith("cli"):
        return "top"
    if names[1:3] == ["passes", "site"]:
        return "site"
    return PART_OF.get(names[1], names[1])


def module_of(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    names = names if names[0] == "tsa_compile" else ("tsa_compile", *names)
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 2 else names)


@pytest.mark.parametrize("top", TOPS)
def test_arrows(top):
    """Imports go one way, those inside functions too."""
    for path in sorted((ROOT / top).rglob("*.py")):
        importer = part_of(module_of(path))
        for module, _ in imports(path):
            if module.startswith("tsa_compile.") and part_of(module) != importer:
                allowed = RANK[part_of(module)] < RANK[importer]
                assert allowed, f"{path.relative_to(ROOT)} ({importer}) imports {module} ({part_of(module)})"


def test_policies_know_no_graph():
    for path in sorted((ROOT / "tsa_compile/policies").glob("*.py")):
        for module, _ in imports(path):
            assert not module.startswith("torch.fx"), f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("folder", TOPS)
def test_optional_packages_are_imported_lazily(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.name.endswith("device.py"):
            continue  # Triton kernels: imported by their host at the first launch
        if path.name.endswith("_backend.py") and path.parent.name == "vllm":
            continue  # classes of vLLM's, which it imports by their path
        for module, lazy in imports(path):
            assert lazy or module.split(".")[0] not in OPTIONAL, f"{path.relative_to(ROOT)} imports {module}"


OPERATIONS = ("attend", "select", "score", "state")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_of_kernels_never_import_one_another(operation):
    """An implementation, a folder such as attend/tokens, sees common, types and checks. What joins them is in compose.py."""
    allowed = ("common", "types", "checks")
    for path in sorted((ROOT / "kernels" / operation).rglob("*.py")):
        own = path.parent.relative_to(ROOT / "kernels").as_posix()
        for module, _ in imports(path):
            if module.startswith("tsa_compile."):
                part = module.removeprefix("tsa_compile.kernels.")
                fine = part.split(".")[0] in allowed or part.startswith(own.replace("/", "."))
                assert fine, f"{path} imports {module}"


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, *args, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_imports_without_the_optional_packages():
    hide = f"import sys; [sys.modules.__setitem__(m, None) for m in {OPTIONAL}]; "
    code = "import tsa_compile, tsa_compile.backend, tsa_compile.frontends.cli, tsa_compile.export, tsa_compile.passes.pipeline"
    run(hide + code + "; import torch; torch.ops.tsa.select_tokens")


def test_no_top_level_package_shadows_another():
    for folder in ("kernels", "tests"):
        assert not list((ROOT / folder).rglob("__init__.py")), f"{folder}/ must stay without __init__.py"
    assert not (ROOT / "conftest.py").exists()


def test_every_folder_is_packaged():
    tomllib = pytest.importorskip("tomllib")
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    for top, prefix in (
        ("tsa_compile", "tsa_compile"),
        *((f, f"tsa_compile.{f}") for f in ("passes", "kernels", "export")),
    ):
        for folder, _, files in os.walk(ROOT / top):
            if any(f.endswith(".py") for f in files):
                name = ".".join([prefix, *Path(folder).relative_to(ROOT / top).parts])
                assert name in packages, f"{name} is missing from pyproject.toml"
