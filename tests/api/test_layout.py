"""The folders: who may import whom, what must import without the optional packages, and the package called `kernels`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"passes": "passes", "kernels": "kernels", "export": "export", "policies": "tsa_compile/policies"}
LEAVES = {"tsa_compile.passes.site"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "policies": {"policies", "kernels"},
    "passes": {"passes", "policies", "kernels"},
    "export": {"export", "passes", "policies", "kernels", "plan"},
}
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
)


def imports(path: Path):
    """(module, inside a function or a TYPE_CHECKING block) for every import of a file."""
    tree = ast.parse(path.read_text())
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            node.parent = parent
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        lazy, at = False, node
        while hasattr(at, "parent"):
            at = at.parent
            lazy |= isinstance(at, (ast.FunctionDef, ast.If))
        yield from ((name, lazy) for name in names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows(folder):
    for path in sorted((ROOT / FOLDERS[folder]).rglob("*.py")):
        for module, lazy in imports(path):
            if not module.startswith("tsa_compile"):
                continue
            part = module.removeprefix("tsa_compile").lstrip(".").split(".")[0]
            allowed = part in MAY_IMPORT[folder] or module in LEAVES or (not part) or (lazy and folder == "policies")
            assert allowed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("folder", ["passes", "kernels", "export", "tsa_compile"])
def test_optional_packages_are_imported_lazily(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path.name.endswith("device.py"):
            continue  # Triton kernels: imported by their host at the first launch
        for module, lazy in imports(path):
            assert lazy or module.split(".")[0] not in OPTIONAL, f"{path.relative_to(ROOT)} imports {module}"


def run(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, *args, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_imports_without_the_optional_packages():
    hide = f"import sys; [sys.modules.__setitem__(m, None) for m in {OPTIONAL}]; "
    code = "import tsa_compile, tsa_compile.backend, tsa_compile.frontends.cli, tsa_compile.export, tsa_compile.passes.pipeline"
    run(hide + code + "; import torch; torch.ops.tsa.select_tokens")


def test_transformers_imports_from_the_checkout():
    pytest.importorskip("transformers")
    code = "import transformers; from transformers import AutoModelForCausalLM, LlamaForCausalLM; print('ok')"
    assert "ok" in run(code)


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
