"""Real prose that every Python has: the language reference behind `help()` and the docstrings of the standard library."""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
from pathlib import Path

_SKIP = {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "pydoc_data"}
_SHORTEST = 200  # characters of a docstring that is prose rather than a label


@functools.cache
def reference_text() -> str:
    """About 1.6 million characters, the same on every call; they differ between Python versions.

    Raises:
        FileNotFoundError: the standard library's sources are not installed.
    """
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _SKIP.isdisjoint(path.relative_to(root).parts):
            parts.extend(_docstrings(path))
    if len(parts) < 2 * len(topics):
        raise FileNotFoundError(f"the standard library's sources are not installed in {root}")
    random.Random(0).shuffle(parts)
    return "\n\n".join(parts)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # test data and templates among the sources
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if text and len(text) >= _SHORTEST]


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Distinct English-looking words of 4 to 9 letters, sorted."""
    return tuple(sorted({w for w in re.findall(r"(?<=[ \n])[a-z]{4,9}(?=[ ,.\n])", reference_text())}))
