"""The folder that what was measured or built on this machine is kept in."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """`tsa_compile` in the user's cache folder, by the XDG base directory specification; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsa_compile"
