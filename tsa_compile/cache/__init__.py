"""The cache of one model's attention: storage that grows by chunks, the layers of transformers, the states beside them."""

from __future__ import annotations

from typing import Any

from tsa_compile.cache.storage import Pool


def Cache(model: Any, batch: int, max_length: int, pool: Pool | None = None) -> Any:
    """A transformers cache with room for `max_length` rows from the start, so that it never grows.

    Pass it to `generate()` or to the model as `past_key_values` (`cache` from transformers 5.24 on).

    Args:
        model: a transformers model; its config says which layers slide.
        batch: rows of the batch; with beams, sequences times beams.
        max_length: rows of the longest sequence, prompt and new tokens.
        pool: where the storage is leased; None: a pool of its own.
    """
    from transformers import DynamicCache

    from tsa_compile.cache.entry import take_over

    for name, number in (("batch", batch), ("max_length", max_length)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}: {number!r}; allowed: an int of at least 1")
    cache = DynamicCache(config=model.config)
    take_over(cache, Pool() if pool is None else pool)
    for layer in cache.layers:
        if hasattr(layer, "lease"):
            layer.lease.expect(batch, max_length)
    return cache
