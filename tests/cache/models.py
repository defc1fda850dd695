"""Small random models of transformers whose calls go through `prepare`, as a session's do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tsa_compile.cache.entry import Prepared, prepare
from tsa_compile.cache.storage import Pool

TINY: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
WINDOW = dict(sliding_window=24)
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", WINDOW),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**WINDOW, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
}


def tiny(family: str, layers: int = 2) -> Any:
    """A random model of the family, the same at every call."""
    transformers = pytest.importorskip("transformers")
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    settings = {**TINY, **more, "num_hidden_layers": layers}
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:layers]
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def hooked(model: Any, pool: Pool | None = None, states_for: Any = None) -> tuple[Any, list[Prepared]]:
    """The model, and what `prepare` said at each of its calls from now on."""
    pool, seen = Pool() if pool is None else pool, []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        more = {} if states_for is None else {"states_for": states_for}
        seen.append(prepare(args, kwargs, pool, **more))

    model.register_forward_pre_hook(before, with_kwargs=True)
    return model, seen


def token_ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def cache_name(model: Any) -> str:
    """The cache's argument: `past_key_values`, and `cache` in later versions."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
