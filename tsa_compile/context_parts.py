"""The arguments and outputs of a call whose rows are spread over ranks: what is cut for a rank, and how all ranks' is joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tsa_compile.kernels.common.group import gather
from tsa_compile.kernels.common.zigzag import ZigZag, gathered

Tensor = torch.Tensor
TOKENS = ("input_ids", "inputs_embeds")
_BY_TOKEN = {**dict.fromkeys(TOKENS, 1), "token_type_ids": 1, "position_ids": -1}  # the dimension of tokens


class Part(NamedTuple):
    """A rank's part of a call.

    Args:
        cut: how rows lie on the ranks.
        rank: of this process.
        group: name of the process group.
        last: the call is asked for so many last rows of logits; 0: for all.
    """

    cut: ZigZag
    rank: int
    group: str
    last: int

    @property
    def last_alone(self) -> int:
        """Rows of logits that every rank computes, of which those of the last chunk's rank count; 0: its own rows'."""
        return self.last if self.last <= len(self.cut.chunks[-1]) else 0

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of this rank's call.

        Raises:
            ValueError: an argument of which it is not known how to cut it.
        """
        own = {name: self._own(name, x) if isinstance(x, Tensor) else x for name, x in given.items()}
        if own.get("position_ids") is None:
            device = next(given[name].device for name in TOKENS if given.get(name) is not None)
            own["position_ids"] = self._rows(torch.arange(self.cut.past, self.cut.length, device=device)[None], 1, self.cut.past)
        return {**own, "logits_to_keep": self.last_alone} if "logits_to_keep" in given else own

    def joined(self, output: Any) -> Any:
        """The output of the whole call, from that of this rank's; every rank calls it.

        Raises:
            RuntimeError: an output that has no row for each token.
        """
        whole = self._joined(output)
        if self.last == self.last_alone:
            return whole
        if isinstance(whole, tuple):
            return whole[0][:, -self.last :], *whole[1:]
        whole["logits"] = whole["logits"][:, -self.last :]
        return whole

    def _joined(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._whole(output)
        if isinstance(output, Mapping):
            return type(output)(**{name: self._joined(x) for name, x in output.items()})
        return tuple(map(self._joined, output)) if isinstance(output, tuple) else output

    def _own(self, name: str, x: Tensor) -> Tensor:
        rows, past = self.cut.length - self.cut.past, self.cut.past
        if name == "attention_mask" and x.dim() == 2 and x.shape[1] == self.cut.length:
            return torch.cat([x[:, :past], self._rows(x, 1, 0)], 1)
        dim = _BY_TOKEN.get(name)
        if dim is not None and x.dim() > 1 and x.shape[dim] == rows:
            return self._rows(x, dim, past)
        raise ValueError(f"ContextParallel does not know how to cut {name} {list(x.shape)} of {rows} tokens behind {past}")

    def _rows(self, x: Tensor, dim: int, first: int) -> Tensor:
        """This rank's of the rows along `dim`, of which the first is at position `first`."""
        return torch.cat([x.narrow(dim, chunk.start - first, len(chunk)) for chunk in self.cut.of(self.rank)], dim)

    def _whole(self, x: Tensor) -> Tensor:
        if x.dim() > 1 and self.last_alone and x.shape[1] == self.last_alone:
            return gather(x, self.group)[self.cut.holders[-1]]
        if x.dim() > 1 and x.shape[1] == self.cut.rows(self.rank):
            flat = x.reshape(*x.shape[:2], -1)
            return gathered(flat[:, None], self.cut, self.group)[:, 0].reshape(x.shape[0], -1, *x.shape[2:])
        raise RuntimeError(f"ContextParallel: an output {list(x.shape)} has no row for each of {self.cut.rows(self.rank)} tokens")
