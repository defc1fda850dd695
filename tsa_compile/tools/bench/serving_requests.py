"""Requests of `serving_engine.py`: random tokens, each with a salt of its own, so that no cached prefix serves another."""

from __future__ import annotations

import itertools
from typing import Any

import torch

_NUMBERS = itertools.count()


def prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=g).tolist()


def ask(llm: Any, lengths: list[int], new: int, salt: str | None = None, **sampling: Any) -> list[Any]:
    """Greedy answers of `new` tokens to prompts of these lengths; `salt`: all are of one seed, and may share what is cached."""
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    given = [prompt(n, vocabulary, seed if salt is None else 0) for seed, n in enumerate(lengths)]
    return answer(llm, given, new, salt, **sampling)


def answer(llm: Any, prompts: list[list[int]], new: int, salt: str | None = None, **sampling: Any) -> list[Any]:
    """Greedy answers of `new` tokens; requests of one `salt` share the prefix cache, without one each has its own part."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **sampling)
    given = [{"prompt_token_ids": ids, "cache_salt": salt or f"request {next(_NUMBERS)}"} for ids in prompts]
    answers: list[Any] = llm.generate(given, wanted, use_tqdm=False)
    return answers
