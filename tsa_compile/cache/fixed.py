"""Around a decode step on fixed buffers: the layers write where a place says, and the call's arguments have fixed sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tsa_compile.cache.lease import as_rows
from tsa_compile.cache.pinned import PinnableRows
from tsa_compile.cache.place import Place


@contextlib.contextmanager
def masked_in_full(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, a cache of such layers is a static one to transformers, which leaves the mask of one query out for others: there
    every row of the keys counts, and here those behind the new one do not."""
    for layer in layers:
        layer.is_compileable = True
    try:
        yield
    finally:
        for layer in layers:
            del layer.is_compileable  # the class says no


@contextlib.contextmanager
def pinned(layers: Sequence[PinnableRows], kwargs: Mapping[str, Any], new: int, steps: int = 1) -> Iterator[dict[str, Any]]:
    """Inside, `new` rows of each batch row go where the layers' place says; yields the call's arguments, of fixed sizes.

    `steps`: of so many rows each, one behind the other, between which the place advances.
    """
    padding, positions = layers[0].lease.padding, as_rows(kwargs.get("position_ids"))
    mask = None if padding is not None else layers[0].own_mask(kwargs.get("attention_mask"), new)
    places = make_places(layers, mask, new * steps)
    for place in places.values():
        place.move(*layers[0].first_new_row(), mask, layers[0].rows_before(), steps)
        if padding is not None:
            place.show(new, padding.rows)
        if any(layer.states.placed for layer in layers):
            place.stand(new, None if positions is None else positions[:, :new])  # of a loop, those of its first step
    seen = _fixed_mask(places[device_of(layers[0])], layers[0], new)
    try:
        for layer in layers:
            layer.pin(places[device_of(layer)])
        yield {**kwargs, **({} if mask is None and padding is None else {"attention_mask": seen})}
    finally:
        for layer in layers:
            layer.unpin()


def _fixed_mask(place: Place, layer: PinnableRows, new: int) -> torch.Tensor:
    if place.shown is not None:
        return place.shown
    return place.mask if new == 1 or layer.lengths is None else place.visible_to(new)


def make_places(layers: Sequence[PinnableRows], mask: torch.Tensor | None, new: int) -> dict[torch.device, Place]:
    """The place of the layers' storage on each of their devices, once there is room for `new` more rows, and for the mask."""
    first = layers[0]
    rows = max(new, 0 if mask is None else mask.shape[1] - first.length)
    if not first.has_room(rows):
        for layer in layers:
            layer.grow(rows)
    storage, dtype = first.storage, torch.int64 if mask is None else mask.dtype
    assert storage is not None
    return {device: storage.place(device, dtype) for device in map(device_of, layers)}


def device_of(layer: PinnableRows) -> torch.device:
    """Where the layer's rows lie."""
    return layer.settled().keys.device
