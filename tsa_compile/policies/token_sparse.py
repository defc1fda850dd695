"""Token Sparse Attention (arXiv 2602.03216, ICML 2026): prefill attention among the tokens the last queries look at.

Per layer, the last `window` queries score all keys; per head the heaviest tokens that together hold a share
1 - `coverage` of the mass are kept, with the last `window`; only kept tokens attend, and only to kept tokens.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.checks import SHARES
from tsa_compile.policies.base import Policy, build, check_int, check_share
from tsa_compile.policies.block_sparse import BlockSparse

if TYPE_CHECKING:
    import torch.fx as fx

    from tsa_compile.passes.site import AttentionSite

ENGINES = ("auto", "fused", "packed", "reference")
MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class Completion:
    """A narrow strip of keys that every row reads beside the kept ones, so that no row is left without attention.

    Not in the paper, which gives rows that are not kept a zero output. One softmax over the union.

    Args:
        window: the row's own and preceding tokens, in tokens.
        sinks: the first tokens of the sequence.
        heavy: the head's heaviest tokens by selection score.
    """

    window: int = 256
    sinks: int = 4
    heavy: int = 256

    def __post_init__(self) -> None:
        check_int(self, "window", 1)
        check_int(self, "sinks", 0)
        check_int(self, "heavy", 0)


@dataclasses.dataclass(frozen=True)
class TokenSparse(Policy):
    """Token Sparse Attention for prefill, with a completion strip; `TokenSparse.paper()` is the paper's, without.

    Args:
        coverage: share of the attention mass that may be dropped, in [0, 1), the paper's tau; 0 keeps every token.
        window: last queries that score the keys; their tokens are always kept.
        pool: width of the average pooling of the scores, odd, in tokens.
        min_tokens: kept tokens beside the window, at least; rows of up to `min_tokens + window` tokens run dense.
        completion: what rows that are not kept read; None: nothing, their attention output is zero, as in the paper. The default
            lists at most `min_tokens` heaviest tokens.
        share: "head": each query head keeps tokens of its own, as in the paper; "group": the query heads of a KV head keep the
            same ones, by the sum of their scores.
        inner: attention among the kept tokens: None for all of them, or `BlockSparse`.
        engine: who computes the attention: "auto", "fused" (Triton), "packed" (vendor library) or "reference".

    Raises:
        ValueError: a field is outside its range; the message names it.
    """

    coverage: float = 0.05
    window: int = 128
    pool: int = 7
    min_tokens: int = 1024
    completion: Completion | None = Completion()
    share: str = "head"
    inner: BlockSparse | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        check_share(self, "coverage")
        check_int(self, "window", 1)
        check_int(self, "pool", 1)
        if self.pool % 2 == 0:
            raise ValueError(f"TokenSparse.pool must be odd, got {self.pool}")
        check_int(self, "min_tokens", 1)
        if self.share not in SHARES:
            raise ValueError(f"TokenSparse.share must be one of {SHARES}, got {self.share!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"TokenSparse.engine must be one of {ENGINES}, got {self.engine!r}")
        self._check_completion()
        self._check_inner()

    def _check_inner(self) -> None:
        if self.inner is None:
            return
        if not isinstance(self.inner, BlockSparse):
            raise ValueError(f"TokenSparse.inner must be a BlockSparse or None, got {self.inner!r}")
        if self.engine == "packed":
            raise ValueError("TokenSparse.engine 'packed' runs dense attention among the kept tokens; with inner use 'auto'")

    def _check_completion(self) -> None:
        c = self.completion
        if c is None:
            return
        if not isinstance(c, Completion):
            raise ValueError(f"TokenSparse.completion must be a Completion or None, got {c!r}")
        if c == Completion() and c.heavy > self.min_tokens:
            object.__setattr__(self, "completion", dataclasses.replace(c, heavy=self.min_tokens))
        elif c.heavy > self.min_tokens:
            raise ValueError(f"Completion.heavy must be <= TokenSparse.min_tokens ({self.min_tokens}), got {c.heavy}")

    @classmethod
    def paper(cls, coverage: float = 0.005, **fields: Any) -> TokenSparse:
        """The paper's setting: no completion, tau 0.005 as for Llama-3.1-8B. It makes half of the layers sparse."""
        return cls(coverage=coverage, **{"completion": None, **fields})

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Policy:
        fields = dict(fields)
        if fields.pop("layers", None) is not None:  # null in files of plan format 1
            raise ValueError("TokenSparse has no field 'layers': a plan's rules say which layers a policy is for")
        if isinstance(fields.get("completion"), dict):
            fields["completion"] = build(Completion, fields["completion"])
        if isinstance(fields.get("inner"), dict):
            fields["inner"] = build(BlockSparse, fields["inner"])
        return super()._from_fields(fields)

    def refuse(self, site: AttentionSite) -> str | None:
        if site.head_dim > MAX_HEAD_DIM:
            return f"head dim {site.head_dim} is above {MAX_HEAD_DIM}"
        return None

    def lower(self, graph: fx.Graph, site: AttentionSite) -> fx.Node:
        from tsa_compile.passes.operands import attention_operands

        q, k, v, key_mask = attention_operands(graph, site)
        c = self.completion
        strip_window, strip_sinks, strip_heavy = (c.window, c.sinks, c.heavy) if c else (0, 0, 0)
        selection = graph.call_function(
            torch.ops.tsa.select_tokens.default,
            (q, k, key_mask, site.scale, float(self.coverage), self.window, self.pool, self.min_tokens, strip_heavy),
            {"share": self.share},
        )
        indices, counts, heavy = (graph.call_function(operator.getitem, (selection, i)) for i in range(3))
        kept = (q, k, v, indices, counts, heavy)
        strip, dense_below = (strip_window, strip_sinks), self.min_tokens + self.window
        if self.inner is None:
            operands = (*kept, key_mask, site.scale, *strip, dense_below, self.engine)
            return graph.call_function(torch.ops.tsa.sparse_attention.default, operands)
        i = self.inner
        chosen = graph.call_function(
            torch.ops.tsa.select_blocks.default,
            (q, k, indices, counts, site.scale, i.block, i.pool, float(i.mass), i.sinks, i.local, dense_below),
        )
        blocks, block_counts = (graph.call_function(operator.getitem, (chosen, n)) for n in range(2))
        return graph.call_function(
            torch.ops.tsa.block_sparse_attention.default,
            (*kept, blocks, block_counts, key_mask, site.scale, *strip, i.block, self.engine),
        )
