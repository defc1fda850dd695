"""Token Sparse Attention (arXiv 2602.03216, ICML 2026): prefill attention among the tokens the last queries look at.

Per layer, the last `window` queries score all keys; per head the heaviest tokens that together hold a share
1 - `coverage` of the mass are kept, with the last `window`; only kept tokens attend, and only to kept tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from tsa_compile.kernels import ops  # noqa: F401 - registers torch.ops.tsa
from tsa_compile.kernels.checks import SHARES
from tsa_compile.kernels.edges import ALL_KEYS, Edges
from tsa_compile.kernels.types import Selection, Strip, TokenRule, Tokens
from tsa_compile.passes.site import VERIFY_ROWS, AttentionSite
from tsa_compile.policies.base import Emit, Policy, build, check_int, check_share
from tsa_compile.policies.block_sparse import BlockSparse

ENGINES = ("auto", "fused", "packed", "reference")


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
        inner: attention among the kept tokens: None for all of them; or a `BlockSparse`, whose blocks, window, sinks and last
            rows are then counted in kept tokens, so that token and block sparsity multiply.
        min_queries: up to so many query rows over a cache are left to the model. 2 to 16 are always: speculative decoding checks
            tokens by them.
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
    min_queries: int = 128
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share(self, "coverage")
        check_int(self, "window", 1)
        check_int(self, "pool", 1)
        if self.pool % 2 == 0:
            raise ValueError(f"TokenSparse.pool must be odd, got {self.pool}")
        check_int(self, "min_tokens", 1)
        check_int(self, "min_queries", 0)
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
        if isinstance(self.inner.alpha, tuple):
            raise ValueError(f"TokenSparse.inner takes one alpha for all heads, got {self.inner.alpha!r}")
        if not self.inner.lookahead:
            raise ValueError("TokenSparse.inner must look ahead: its tokens are chosen by the last queries of all")
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

    @property
    def shareable(self) -> bool:
        return True

    def refuse(self, site: AttentionSite) -> str | None:
        return None if self.inner is None else self.inner.refuse(site)

    def guaranteed(self, site: AttentionSite) -> Edges:
        """The window of the strip; with blocks of kept tokens, as much of it as each kept row reads among these."""
        if self.coverage == 0 or (isinstance(site.k_len, int) and site.k_len <= self._dense_below):
            return Edges.every() if self.inner is None else self.inner.guaranteed(site)
        if self.completion is None:
            return Edges.none()
        local = ALL_KEYS if self.inner is None or self.inner.alpha == 0 else self.inner.before + 1
        return Edges.window(min(local, self.completion.window))

    def remark(self, site: AttentionSite) -> str:
        longer = isinstance(site.k_len, int) and site.k_len > self._dense_below
        return "" if longer else f"up to {self._dense_below} tokens are all kept"

    def kernel_lengths(self) -> tuple[int, ...]:
        return (self._dense_below,)

    @property
    def _dense_below(self) -> int:
        """Rows of up to so many tokens keep all of them."""
        return self.min_tokens + self.window

    @property
    def _strip(self) -> Strip:
        return Strip(self.completion.window, self.completion.sinks) if self.completion else Strip()

    def select(self, emit: Emit, site: AttentionSite, state: Any) -> Tokens:
        x = site.operands
        heavy = self.completion.heavy if self.completion else 0
        rule = TokenRule(float(self.coverage), self.window, self.pool, self.min_tokens, heavy)
        options: dict[str, Any] = {"share": self.share}
        if site.past and not isinstance(site.q_len, int):  # the operator alone knows how many rows there are
            options["min_queries"] = max(self.min_queries, VERIFY_ROWS)
        return Tokens(*emit(torch.ops.tsa.select_tokens.default, x.q, x.k, *x.view.order, site.scale, *rule, **options))

    def attend(self, emit: Emit, site: AttentionSite, selection: Selection | None) -> Any:
        assert isinstance(selection, Tokens)
        if self.inner is not None:
            return self._attend_blocks(emit, site, selection, self.inner)
        x = site.operands
        numbers = (site.scale, *self._strip, self._dense_below, self.engine)
        return emit(torch.ops.tsa.sparse_attention.default, x.q, x.k, x.v, *selection, *x.view.order, *numbers)[0]

    def _attend_blocks(self, emit: Emit, site: AttentionSite, kept: Tokens, inner: BlockSparse) -> Any:
        x, i = site.operands, inner
        assert not isinstance(i.alpha, tuple)
        rule = (float(i.alpha), i.pool, i.window, i.sinks, i.last_dense, i.share)
        numbers = (site.scale, *self._strip, *rule, self.engine)
        return emit(torch.ops.tsa.token_block_attention.default, x.q, x.k, x.v, *kept, *x.view.order, *numbers)[0]
