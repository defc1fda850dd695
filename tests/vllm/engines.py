"""A small random model on disk, and vLLM engines of it in this process."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
BLOCK = 32  # tokens of a page


def save_model(folder: Path, **changes: Any) -> str:
    """A Llama of random weights, large enough that what is attended to decides the next token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    words = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    rest = dict(max_position_embeddings=4096, initializer_range=0.08, tie_word_embeddings=False)
    config = LlamaConfig(**{**sizes, **words, **rest, **changes})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 3  # attention that looks at few keys
    model.save_pretrained(folder)
    return str(folder)


def prompts(lengths: list[int], seed: int = 0, shared: int = 0) -> list[dict[str, list[int]]]:
    """Token ids; the first `shared` are the same in all."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, VOCABULARY, (n,), generator=g).tolist()  # noqa: E731
    head = draw(shared)
    return [{"prompt_token_ids": head + draw(n - shared)} for n in lengths]


@contextlib.contextmanager
def engine(model: str, tsa: dict[str, Any] | None = None, custom: bool = True, **changes: Any):
    """An `LLM`; `custom=False`: vLLM's own attention."""
    from vllm import LLM

    options: dict[str, Any] = dict(
        dtype="float32", skip_tokenizer_init=True, enforce_eager=True, block_size=BLOCK, max_model_len=2048, max_num_seqs=8,
        seed=0, disable_log_stats=True,
    )  # fmt: skip
    if custom:
        options |= dict(attention_backend="CUSTOM", additional_config={"tsa": tsa} if tsa is not None else {})
    llm = LLM(model, **{**options, **changes})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def tokens(llm: Any, given: list[dict[str, list[int]]], new: int = 12) -> list[list[int]]:
    """Greedy tokens for each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    return [list(x.outputs[0].token_ids) for x in llm.generate(given, sampling, use_tqdm=False)]
