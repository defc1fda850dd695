"""A model's steps over one request's cache, whose batch rows may hold different numbers of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tsa_compile.cache.lease import Padding
from tsa_compile.cache.names import cache_name
from tsa_compile.cache.pinned import PinnableRows
from tsa_compile.generate.draft_loop import Drafted, DraftLoop
from tsa_compile.session import Session

Tensor = torch.Tensor


class CachedSteps:
    """Calls the model on a few tokens of each row behind those that are cached.

    Args:
        model: a decoder of transformers.
        session: its session.
        cache: after the prefill; every row holds the same number of tokens.
        given: the arguments of its calls, as `generate()` has them after the prefill: the padding mask `[B, L]`, and the position
            ids `[..., B, L]` of the prompt.
        new: tokens that may follow the prompt; positions stay below.
    """

    def __init__(self, model: Any, session: Session, cache: Any, given: Mapping[str, Any], new: int) -> None:
        self.model, self.session, self.cache = model, session, cache
        name = cache_name(model)
        assert name is not None
        self._name = name
        self._mask: Tensor | None = given.get("attention_mask")
        positions = given.get("position_ids")
        self._positions: Tensor | None = None if positions is None else positions[..., -1:]  # of the last token of the prompt
        self._prompt, self._new = cache.get_seq_length(), new
        self._padding: Padding | None = None  # where it is known
        self.apart: list[int] | None = None  # tokens of each row, where they may differ
        self._ahead: Tensor | int = 0  # cached tokens behind the prompt; int64 [B, 1], where they may differ

    @property
    def length(self) -> int:
        """Cached tokens of the longest row."""
        return int(self.cache.get_seq_length())

    def why_together(self) -> str | None:
        """Why batch rows cannot hold different numbers of tokens; None: they can."""
        if not all(isinstance(layer, PinnableRows) for layer in self.cache.layers):
            return "a layer of the cache does not keep all rows, or is not ours"
        if getattr(self.model.config, "_attn_implementation", None) != "sdpa":
            return "the model's attention implementation is not sdpa"
        if not getattr(self.model, "_can_compile_fullgraph", False):
            return f"{type(self.model).__name__} does not say that it works with static caches"
        return "the model takes no position ids" if self._positions is None else None

    def look_at_padding(self) -> None:
        """Steps need no mask, from now on, where only a prompt's first tokens are padding: one look at the device."""
        if self.why_together() is not None:
            return
        if self._mask is None:
            self._padding = Padding(None)
            return
        real = self._mask.bool()
        first = (~real).sum(1)
        behind = torch.arange(real.shape[1], device=real.device) >= first[:, None]
        at_left, any_padding = torch.stack([(behind == real).all(), first.any()]).tolist()
        if at_left:
            self._padding = Padding(first.to(torch.int32) if any_padding else None)
            self._mask = self._mask if any_padding else None

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside, the layers know what is padding."""
        lease = None if self._padding is None else self.cache.layers[0].lease
        if lease is not None:
            lease.padding = self._padding
        try:
            yield
        finally:
            if lease is not None:
                lease.padding = None

    def part(self, batch: int) -> None:
        """From now on rows may differ."""
        self.apart = [self.length] * batch
        self._set_lengths()

    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` `[B, n]` to every row; the logits `[B, n, V]` behind each, float32."""
        n = tokens.shape[1]
        with self._telling():
            logits: Tensor = self.session(**self._call(tokens, n)).logits
        self._advance(n)
        return logits[:, -n:].float()

    def loop(self, tokens: Tensor, loop: DraftLoop) -> Drafted | None:
        """All steps of `loop` behind `tokens` `[B, 1]`, as one call; None: they do not run on fixed buffers."""
        with self._telling():
            drafted = self.session.loop(loop, **self._call(tokens, loop.steps))
        if drafted is not None:
            self._advance(loop.steps)
        return drafted

    def _call(self, tokens: Tensor, n: int) -> dict[str, Any]:
        """The arguments of a call on `tokens`, of which the mask is; positions are those of the next `n` tokens."""
        kwargs = {"input_ids": tokens, "use_cache": True, "return_dict": True, self._name: self.cache}
        if self._positions is not None:
            kwargs["position_ids"] = self._next_positions(n)
        if self._mask is not None or (self.apart is not None and self._padding is None):
            kwargs["attention_mask"] = self._mask_with(tokens.shape[1], tokens)
        return kwargs

    def _advance(self, n: int) -> None:
        self._ahead = self._ahead + n
        if self.apart is not None:
            self.apart = [length + n for length in self.apart]

    def keep(self, new: Sequence[int], on_device: Tensor | None = None) -> None:
        """Row `b` keeps the prompt and `new[b]` tokens behind it: the same number, unless rows may differ.

        `on_device`: the same, int64 `[B]`, if it is there: then nothing is copied to it.
        """
        if self.apart is None:
            self.cache.crop(self._prompt + new[0] - self.length)  # 0, too: layers with a window go back to its size
            self._ahead = new[0]
        else:
            self.apart = [self._prompt + n for n in new]
            self._set_lengths(None if on_device is None else on_device + self._prompt)

    def restart(self, rows: Tensor, mask: Tensor, positions: Tensor) -> None:
        """Batch rows `rows` `[n]` have other prompts: their `mask` and `positions`, `[n, L]`, as many places as the ones before.

        Rows may differ. The caller writes the keys and values of these prompts, and calls `keep` then.
        """
        assert self.apart is not None
        assert self._mask is not None
        assert self._positions is not None
        self._mask[rows], self._positions[rows] = mask, positions[:, -1:]
        self._padding = None
        longest = self._mask_with(0, self._mask)
        for layer in self.cache.layers:
            layer.key_mask = longest.bool()

    def _set_lengths(self, lengths: Tensor | None = None) -> None:
        assert self.apart is not None
        if lengths is None:
            lengths = torch.tensor(self.apart, device=self.cache.layers[0].settled().keys.device)
        self._ahead = lengths[:, None] - self._prompt
        lengths = lengths.to(torch.int32)
        for layer in self.cache.layers:
            layer.set_lengths(lengths, max(self.apart))

    def _next_positions(self, n: int) -> Tensor:
        """Those behind the last token of the prompt. What is proposed beyond the last token that may follow is never kept."""
        assert self._positions is not None
        behind = self._ahead + torch.arange(1, n + 1, device=self._positions.device)
        return self._positions + behind.clamp(max=self._new)

    def _mask_with(self, n: int, tokens: Tensor) -> Tensor:
        """`[B, length + n]`: the prompt's mask, and what stands behind it up to each row's own new tokens."""
        longest = self.length + n
        mask = tokens.new_ones(tokens.shape[0], longest) if self._mask is None else self._mask.new_ones(tokens.shape[0], longest)
        if self._mask is not None:
            mask[:, : self._mask.shape[1]] = self._mask
        if self.apart is not None:
            mask *= torch.arange(longest, device=mask.device) < self._ahead + (self._prompt + n)
        return mask
