"""The work of `tsa-compile calibrate`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tsa_compile.learn.calibrate import calibrate
from tsa_compile.learn.prompt_file import read_prompts
from tsa_compile.learn.target import Target
from tsa_compile.plan import Plan
from tsa_compile.policies.base import from_dict
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer


def calibrate_files(
    model: str,
    prompts: Sequence[str],
    target: str,
    policy: str | None,
    coverages: Iterable[float] | None,
    alphas: Iterable[float] | None,
    keeps: Iterable[float] | None,
    method: str,
    last: int,
    max_tokens: int | None,
    state: str | None,
) -> Plan:
    """`calibrate` with a model by name, prompts and policy from files; arguments as there."""
    Target.parse(target)  # before the model loads
    base = _read_policy(policy) if policy else None
    given = list(read_prompts(prompts, lambda: load_tokenizer(model), max_tokens))
    options: dict[str, Any] = {
        "coverages": coverages,
        "alphas": alphas,
        "keeps": keeps,
        "method": method,
        "last": last,
        "state": state,
    }
    return calibrate(load_causal_lm(model), given, target, policy=base, **options)


def _read_policy(path: str) -> TokenSparse | BlockSparse | PageSparse:
    """Raises ValueError, naming option and file, if it holds none of them."""
    try:
        policy = from_dict(json.loads(Path(path).read_text()))
        if not isinstance(policy, (TokenSparse, BlockSparse, PageSparse)):
            raise ValueError(f"policy must be a TokenSparse, a BlockSparse or a PageSparse, got {policy!r}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--policy {path}: {error}") from error
    return policy
