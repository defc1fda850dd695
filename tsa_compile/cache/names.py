"""What models of transformers call the argument that is their cache."""

from __future__ import annotations

import inspect
from typing import Any

CACHES = ("cache", "past_key_values")  # from 5.24 on; up to 5.23


def cache_name(model: Any) -> str | None:
    """The name by which the model's forward takes its cache; None: it takes none."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in names), None)
