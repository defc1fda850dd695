"""What a plan of `BlockSparse` costs the rows of one text that it does not make dense, by the kernels that run it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tsa_compile.check import compare_logits
from tsa_compile.learn.block_calls import BlockCall, handled
from tsa_compile.learn.output_errors import relative_errors
from tsa_compile.plan import Plan
from tsa_compile.tools.evaluate.losses import token_losses
from tsa_compile.tools.evaluate.runner import Runner

Tensor = torch.Tensor
ROWS = 128  # of each stretch whose predictions are compared
Row = dict[str, Any]


@dataclasses.dataclass
class _Seen:
    """Of the attentions that ran by blocks, in their order: pairs read; error of each head over the sparse rows; how many these
    are."""

    pairs: list[float] = dataclasses.field(default_factory=list)
    errors: list[Tensor] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)


class RowsMeter:
    """Runs one text at a time under any plan.

    Args:
        runner: of the model.
        ids: `[L]`, to find the attentions that can be sparse.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, runner: Runner, ids: Tensor) -> None:
        self._runner = runner
        self.layers = sorted(runner.find_layers(self._batch(ids)))
        if not self.layers:
            raise ValueError("no attention of this model can be sparse; see tsa-compile explain")

    def pairs(self, ids: Tensor, plan: Plan) -> float:
        """Share of the causal query-key pairs that `plan` reads of ids `[L]`; layers that it leaves dense count."""
        return self._share(self._run(ids, plan, errors=False)[1])

    def measure(self, ids: Tensor, plan: Plan) -> Row:
        """KL from dense in nats of the last ROWS predictions of sparse rows ("end") and of those in the middle, and the shares of
        equal top tokens; perplexity over the sparse rows, and dense; errors of the attention's output over them, relative.

        Raises:
            ValueError: the text is too short for both stretches.
        """
        hidden, seen = self._run(ids, plan, errors=True)
        rows = min(seen.rows, default=len(ids))
        middle = (len(ids) - ROWS) // 2
        if rows - ROWS < middle + ROWS:
            raise ValueError(f"a text of {len(ids)} tokens has {rows} sparse rows, too few for two stretches of {ROWS}")
        dense = self._runner.prefill(self._batch(ids), None).hidden
        row: Row = {"pairs": self._share(seen), "sparse_rows": rows}
        for name, first in (("end", rows - ROWS), ("middle", middle)):
            found = compare_logits(*(self._runner.logits(x[0, first : first + ROWS]) for x in (dense, hidden)))
            row |= {f"kl_{name}": found.kl, f"top1_{name}": found.top1}
        for name, states in (("perplexity", hidden), ("dense_perplexity", dense)):
            row[name] = token_losses(self._runner, states[:, :rows], self._batch(ids[:rows])).double().mean().exp().item()
        return row | self._errors(seen)

    def _errors(self, seen: _Seen) -> Row:
        """Of layers that are dense there is none."""
        heads = torch.stack(seen.errors)
        layers = heads.mean(1).tolist()
        return {"error": heads.mean().item(), "worst_head": heads.max().item(), "worst_layer": max(layers), "by_layer": layers}

    def _share(self, seen: _Seen) -> float:
        dense = len(self.layers) - len(seen.pairs)
        return (sum(seen.pairs) + dense) / len(self.layers)

    def _run(self, ids: Tensor, plan: Plan, errors: bool) -> tuple[Tensor, _Seen]:
        seen = _Seen()

        def look(number: int, call: BlockCall) -> Tensor:
            out, share = call.sparse()
            seen.pairs.append(share.mean().item())
            if errors:
                seen.rows.append(call.sparse_rows)
                seen.errors.append(relative_errors(*(x[:, :, : call.sparse_rows] for x in (out, call.dense()))).cpu())
            return out

        with handled(look):
            found = self._runner.prefill(self._batch(ids), plan)
        if not seen.pairs or len(seen.pairs) != len(found.kept):
            raise ValueError(f"{len(found.kept)} attentions of the plan select, of which {len(seen.pairs)} are BlockSparse")
        return found.hidden, seen

    def _batch(self, ids: Tensor) -> Tensor:
        return ids[None].to(self._runner.device)
