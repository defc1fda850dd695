"""What makes results comparable: the model, and where and with what it ran."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tsa_compile.tools.evaluate.reference_text import reference_text


def setting(name: str, samples: int, model: Any) -> dict[str, Any]:
    """Of a transformers model that the report calls `name`."""
    import transformers

    gpu = torch.cuda.get_device_name() if next(model.parameters()).device.type == "cuda" else "CPU"
    return {
        "model": name, "samples": samples, "dtype": str(model.dtype).removeprefix("torch."), "device": gpu,
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "text": hashlib.sha256(reference_text().encode()).hexdigest()[:16],
    }  # fmt: skip


def check_lengths(lengths: Sequence[int], model: Any) -> None:
    """Raises a ValueError if a prompt is longer than the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max(lengths) > limit:
        raise ValueError(f"lengths go up to {max(lengths)}, but the model has {limit} positions")


def setting_line(data: Mapping[str, Any]) -> str:
    """Where and with what results were measured, for a report."""
    s = data["setting"]
    machine = f"{s['device']}, {s['dtype']}, torch {s['torch']}, transformers {s['transformers']}, Python {s['python']}"
    return f"{machine}; {s['samples']} samples a cell"
