"""Requests of each rank's own behind rows that all ranks hold together: many requests about one corpus.

The corpus is a cache that is spread over a process group (`Routed`). A rank's requests have rows of their own behind it, in its
own buffers. In a decode step their queries go to every rank, which attends to what it holds of the corpus, and what is found
comes back and is merged with the request's own rows ("Move the Query, Not the Cache", arXiv 2606.01502).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from tsa_compile.cache.buffered import Pair, joined
from tsa_compile.cache.lease import Lease
from tsa_compile.cache.part_methods import PartMethods
from tsa_compile.cache.route_choice import decide
from tsa_compile.cache.sharded import Shard, SpreadMethods
from tsa_compile.cache.storage import Pool
from tsa_compile.kernels.routed import at_hand, sharing


class SharedMethods(PartMethods):
    """What a layer of transformers does otherwise where its first rows are those of `prefix`, which stays as it is."""

    where = "stand behind rows that others share"

    def __init__(self, prefix: SpreadMethods, **kwargs: Any) -> None:
        self.prefix = prefix
        super().__init__(**kwargs)
        self.total = prefix.total

    @property
    def keeping(self) -> Shard:
        return self.prefix.keeping

    def clear(self) -> None:
        """Only the shared rows are left."""
        super().clear()
        self.total = self.prefix.total

    def remove_last(self, rows: int) -> None:
        self.settle()
        if rows > self.length:
            raise ValueError(f"rows: {rows} to remove, of {self.length}; the others are shared")
        super().remove_last(rows)
        self.total -= rows

    def advance(self, rows: int) -> None:
        super().advance(rows)
        self.total += rows

    def own_mask(self, mask: torch.Tensor | None, new: int) -> torch.Tensor:
        keys = self.settled().keys
        if mask is None:
            return torch.ones(keys.shape[0], self.length + new, dtype=torch.int64, device=keys.device)
        return mask[:, self.prefix.total :]

    @contextlib.contextmanager
    def around_step(self, layers: Sequence[Any]) -> Iterator[bool]:
        """Attentions ask for the shared rows by the address of a request's own; so no step is recorded."""
        prefixes = [layer.prefix for layer in layers]
        decide(prefixes, self.settled().keys.shape[0], 1)  # each holder attends for the requests of all ranks
        held = {layer.settled().keys.data_ptr(): layer.prefix.views() for layer in layers}
        here = at_hand() if prefixes[0].way == "fetch" else contextlib.nullcontext()
        with sharing(lambda keys: held.get(keys.data_ptr())), here:
            yield True

    def as_plain(self) -> Any:
        """A layer of transformers with every row; all ranks call it."""
        layer = self.plain()
        rows = self._joined(*(x[:, :, :0] for x in self.settled()[:2]))
        layer.lazy_initialization(*rows)
        layer.keys, layer.values = rows
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._refuse("copies")

    def __reduce__(self) -> NoReturn:
        self._refuse("pickles: the other ranks' rows are not here")

    def _store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._write(keys, values)
        self.total += keys.shape[-2]

    def _joined(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """The shared rows are fetched, and stand before those of each request."""
        assert self.buffers is not None
        whole = [self.prefix.shard.fetch(x, self.prefix.total).expand(len(keys), -1, -1, -1) for x in self.prefix.views()]
        own = [x[:, :, : self.length] for x in self.buffers[:2]]
        return joined((whole[0], whole[1]), joined((own[0], own[1]), (keys, values)))

    def _padding(self) -> torch.Tensor | None:
        mask = super()._padding()
        return None if mask is None else mask[:, self.prefix.total :]


def share_prefix(cache: Any, batch: int, pool: Pool | None = None) -> Any:
    """A cache of `batch` requests of this rank's own behind the rows of `cache`, which all ranks' requests share.

    Every rank makes one, with the same batch, and takes the same number of steps: a rank without more to say calls on, as
    `generate(synced_gpus=True)` does. Decode steps need `Routed()`, every key of the corpus; they are not recorded. Prompts of
    several tokens fetch the corpus, a layer at a time. `cache` must not change while it is shared.

    Args:
        cache: of one batch row, filled under a plan with `Routed()`; its tokens are the same on every rank.
        batch: requests of each rank.
        pool: where buffers are leased; None: a pool of its own.

    Raises:
        ValueError: `cache` is not spread over a group, has no rows, or several batch rows; `batch` is below 1.
    """
    from transformers import DynamicCache

    from tsa_compile.cache.hf_layers import layer_types

    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: {batch!r}; allowed: an int of at least 1")
    layers = list(cache.layers)
    if not layers or not all(isinstance(layer, SpreadMethods) and layer.count() for layer in layers):
        raise ValueError(f"share_prefix takes a cache that was filled under Plan(decode=Routed()), not one of {layers[:1]}")
    rows = layers[0].settled().keys.shape[0]
    if rows != 1:
        raise ValueError(f"share_prefix takes a cache of one batch row, not of {rows}")
    shared: Any = DynamicCache()
    lease = Lease(Pool() if pool is None else pool)
    shared.layers = [layer_types().shared(layer, lease=lease) for layer in layers]
    for layer, prefix in zip(shared.layers, layers, strict=True):
        prefix.settle()
        layer.total = prefix.total
        layer.lazy_initialization(*(x[:, :, :0].expand(batch, -1, -1, -1) for x in prefix.views()))
    return shared
