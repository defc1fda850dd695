"""The wheel, installed into an environment with torch and our other requirements alone, works from another folder."""

from __future__ import annotations

import importlib.metadata as metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytest.importorskip("build", reason="extra 'dev' is not installed")
requirements = pytest.importorskip("packaging.requirements", reason="extra 'dev' is not installed")

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "tsa_compile", "passes", "kernels", "export")
SCRIPT = """
import importlib.util, sys, torch, torch.nn.functional as F

class Attention(torch.nn.Module):
    def forward(self, q):
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

q, model = torch.randn(1, 2, 200, 16), Attention()
dense = model(q)
assert "tsa" in torch._dynamo.list_backends()  # the entry point; nothing imported tsa_compile yet
assert "tsa_compile" not in sys.modules
exact = {"coverage": 0.0, "compiler": "eager"}
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="tsa", options=exact)(q), dense)
import tsa_compile as tsa
with torch.no_grad():
    sparse = tsa.transform(model, tsa.TokenSparse.paper(coverage=0.3, window=16, min_tokens=32))(q)
assert tsa.report(model).sites[0].replaced
assert not torch.allclose(sparse, dense)
for name in ("transformers", "onnx", "onnxruntime", "hypothesis"):
    assert importlib.util.find_spec(name) is None, name
from tsa_compile.export.native.library import SOURCES
print(tsa.__file__, len(list(SOURCES.glob("*.cc"))))
"""


def requirements_of(name: str) -> set[str]:
    """A distribution and all that it requires here, extras left out."""
    found: set[str] = set()
    left = [name]
    while left:
        if (at := left.pop().lower().replace("_", "-")) in found:
            continue
        found.add(at)
        needs = map(requirements.Requirement, metadata.requires(at) or ())
        left += [n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return found


def link(name: str, site: Path) -> None:
    """Put an installed distribution into another environment, by links."""
    distribution = metadata.distribution(name)
    for top in {Path(str(file)).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        target = Path(str(distribution.locate_file(top)))
        if not (site / top).exists():
            (site / top).symlink_to(target)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The environment's bin folder."""
    source, out, home = (tmp_path_factory.mktemp(name) for name in ("source", "wheel", "venv"))
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    venv.create(home)
    python = home / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
    )
    for name in sorted(set().union(*map(requirements_of, ("torch", "numpy", "rich", "typer")))):
        link(name, site)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "bin"


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)


def test_transform_and_the_backend_run_from_the_wheel(installed, tmp_path):
    done = run([installed / "python", "-c", SCRIPT], tmp_path)
    assert done.returncode == 0, done.stderr
    file, sources = done.stdout.split()
    assert file.startswith(str(installed.parent))
    assert int(sources) == len(list((ROOT / "export" / "native" / "csrc").glob("*.cc")))


def test_the_command_runs_and_names_what_is_missing(installed, tmp_path):
    done = run([installed / "tsa-compile", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("demo", "explain", "compare", "calibrate", "eval", "export", "zoo", "bench"))
    done = run([installed / "tsa-compile", "demo"], tmp_path)
    assert done.returncode == 1
    assert 'pip install "tsa-compile[demo]"' in done.stderr
    assert "Traceback" not in done.stderr
