"""Block-diffusion checkpoints for `diffuse`: weights of SDAR, Fast-dLLM v2, LLaDA and LLaDA 2, run by transformers' own models.

The code that lies beside such weights is not run; `families` says what each family is.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsa_compile.generate import families
from tsa_compile.generate.block_cache import BlockCache
from tsa_compile.generate.diffused import Diffused
from tsa_compile.generate.diffusion import diffuse
from tsa_compile.generate.unmask import Sampling

Tensor = torch.Tensor
_IMPLEMENTATION = "tsa_block_cache"
_cache: contextvars.ContextVar[BlockCache] = contextvars.ContextVar("tsa_block_cache")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model, and how it was made to be sampled."""

    model: TransformersModel
    sampling: Sampling

    def diffuse(self, ids: Tensor, new_tokens: int, **changes: Any) -> Diffused:
        """`diffusion.diffuse` with the checkpoint's own sampling; `changes` are its further arguments, and go before."""
        return diffuse(self.model, ids, new_tokens, **dataclasses.asdict(self.sampling) | changes)


class TransformersModel:
    """A causal language model of transformers as a `BlockModel`: its attention is the cache's, in every layer.

    Args:
        model: of a class that takes its attention from transformers' interface, such as Llama, Qwen2 or Qwen3; its attention
            implementation is changed. A model whose predictions are of the next token is `shifted` to `diffuse`.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(_IMPLEMENTATION, _attend)
        AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)
        self.model: Any = model
        set_implementation: Any = model.set_attn_implementation
        set_implementation(_IMPLEMENTATION)

    def __call__(self, ids: Tensor, positions: Tensor, attend: BlockCache) -> Tensor:
        token = _cache.set(attend)
        try:
            found = self.model(input_ids=ids, position_ids=positions.expand(ids.shape[0], -1), use_cache=False).logits
        finally:
            _cache.reset(token)
        assert isinstance(found, Tensor)
        return found


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    cache = _cache.get(None)
    if cache is None:
        raise RuntimeError(f"attention {_IMPLEMENTATION!r} runs under generate.diffusion.diffuse alone")
    special = [n for n in ("softcap", "s_aux", "sliding_window") if options.get(n) is not None]
    if special:
        raise NotImplementedError(f"{type(module).__name__}: attention with {special[0]} in block diffusion")
    layer: Any = module.layer_idx
    return cache(layer, q, k, v, scaling).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **options: Any) -> None:
    return None


def load(folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Checkpoint:
    """A checkpoint of SDAR (dense ones), Fast-dLLM v2, LLaDA (8B, 1.5) or LLaDA 2 in a folder: `config.json`, `*.safetensors`.

    Raises:
        ValueError: the configuration is of none of them, or has something that transformers' model lacks; weights are missing or
            left over.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    kind, sizes = families.described(config)
    weights = families.renamed(_tensors(Path(folder)), config)
    model, found = kind.from_pretrained(None, config=sizes, state_dict=weights, dtype=dtype, output_loading_info=True)
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(f"{folder}: weights missing {missing[:3]}, left over {unexpected[:3]}")
    return Checkpoint(TransformersModel(model.to(device).eval()), families.sampling_of(config))


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    def read() -> Iterator[tuple[str, Tensor]]:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no dict

    found = dict(read())
    if not found:
        raise ValueError(f"{folder} has no *.safetensors")
    return found
