"""What a lookahead index is to predict: the pages that the tokens after a query attend to, by the dense model's own attention."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.learn.top_p import top_p

Tensor = torch.Tensor


class Windows:
    """The tokens behind some queries of a text, the pages that they may need, and those that they do.

    A query at position `t` chooses for the tokens `t + 1` to `t + interval`. Pages that are resident anyway, the first `sinks`
    and the last `recent` at `t`, are no candidates, and the attention to them counts nowhere.

    Args:
        length: tokens of the text.
        rows: int64 `[n]`, the positions of the queries, on the device of what is shown.
        interval, sinks, recent: of `Resident`.
        share: `LookaheadTraining.top_p`.

    Attributes:
        candidates: bool `[n, P]`, over the whole pages of the text.
        mass: float32 `[n, P]`, the attention to candidates, summed over the layers, and a mean over tokens and heads.
        layers: that were added.
    """

    def __init__(self, length: int, rows: Tensor, interval: int, sinks: int, recent: int, share: float) -> None:
        self.rows, self._interval, self._share = rows, interval, share
        page = torch.arange(length // PAGE, device=rows.device)
        self.candidates = (page >= sinks) & (page <= (rows // PAGE - recent)[:, None])
        self.mass = torch.zeros(self.candidates.shape, device=rows.device)
        self._needing = torch.zeros(len(rows), interval, len(page), dtype=torch.int16, device=rows.device)  # layers
        self.layers = 0

    def add(self, q: Tensor, k: Tensor, scale: float) -> None:
        """One layer's queries `[H, L, D]` and keys `[Hk, L, D]`, rotated."""
        length, pages = k.shape[1], self.mass.shape[1]
        self.layers += 1
        for n, row in enumerate(self.rows.tolist()):
            at = torch.arange(row + 1, min(row + 1 + self._interval, length), device=k.device)
            shares = torch.zeros(len(at), length, device=k.device)
            hidden = torch.arange(length, device=k.device) > at[:, None]
            for g, keys in enumerate(k):
                own = q.unflatten(0, (len(k), -1))[g, :, at].float()
                shares += (own @ keys.float().mT * scale).masked_fill(hidden, -torch.inf).softmax(-1).sum(0)
            by_page = (shares / len(q))[:, : pages * PAGE].unflatten(1, (pages, PAGE)).sum(-1)
            by_page = torch.where(self.candidates[n], by_page, 0.0)
            self.mass[n] += by_page.mean(0)
            self._needing[n, : len(at)] += top_p(by_page, self._share)

    def needed(self, agree: int) -> Tensor:
        """bool `[n, P]`: pages that so many layers need at one of the tokens."""
        return (self._needing >= agree).any(1)


def draw_rows(length: int, number: int, interval: int, sinks: int, recent: int, generator: torch.Generator) -> Tensor:
    """int64 `[number at most]`: positions behind the first quarter with candidates before and a whole window after them.

    Raises:
        ValueError: the text has none.
    """
    low, high = max(length // 4, (sinks + recent + 1) * PAGE), length - interval  # two candidates at least
    if high <= low:
        raise ValueError(f"a text of {length} tokens has no query behind token {low} with {interval} tokens after it")
    return torch.randperm(high - low, generator=generator)[:number] + low
