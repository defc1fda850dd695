"""`Plan.reuse`: which attentions take the selection of another one, as in cross-layer routes (CLSA, arXiv 2606.06467)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tsa_compile.passes.site import PHASES, AttentionSite, Route
from tsa_compile.rules import bound, under


class Reuse(NamedTuple):
    """Attention modules that read what another one selects; the first entry of a plan that matches decides.

    Args:
        modules: those that take a selection: a pattern of their paths or of a module above them (`fnmatch`), such as
            "model.layers.[1-3]", or the number of a layer.
        anchor: the attention that selects, in the same way: one of the same graph, before them, with the same policy.
        heads: for each KV head of the modules, the anchor's KV head whose list it reads; None: the same one.
        phase: in which.
    """

    modules: str | int
    anchor: str | int
    heads: tuple[int, ...] | None = None
    phase: str = "decode"

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "heads": None if self.heads is None else list(self.heads)}


def read_reuse(given: Any) -> tuple[Reuse, ...]:
    """Entries from what users pass or a file holds.

    Raises:
        ValueError, TypeError: an entry that is none; the message names it.
    """
    if given is None:
        return ()
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"Plan.reuse must be a list of Reuse(modules, anchor, heads, phase), or None, got {given!r}")
    return tuple(_entry(f"Plan.reuse[{n}]", entry) for n, entry in enumerate(given))


def _entry(field: str, given: Any) -> Reuse:
    if isinstance(given, Mapping) and not set(given) <= set(Reuse._fields):
        raise ValueError(f"{field} has no field {min(set(given) - set(Reuse._fields))!r}; its fields are {list(Reuse._fields)}")
    try:
        entry = Reuse(**given) if isinstance(given, Mapping) else Reuse(*given)
    except TypeError as error:
        raise TypeError(f"{field} must be (modules, anchor, heads, phase), got {given!r}") from error
    for name in ("modules", "anchor"):
        value = getattr(entry, name)
        if not isinstance(value, (str, int)) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise ValueError(f"{field}.{name} must be a pattern of paths or the number of a layer, got {value!r}")
    heads = None if entry.heads is None else tuple(entry.heads)
    if heads is not None and not (heads and all(type(h) is int and h >= 0 for h in heads)):
        raise ValueError(f"{field}.heads must be numbers of KV heads, one for each of the modules', got {entry.heads!r}")
    if entry.phase not in PHASES:
        raise ValueError(f"{field}.phase must be one of {PHASES}, got {entry.phase!r}")
    return entry._replace(heads=heads)


def bind_reuse(entries: Iterable[Reuse], paths: list[str]) -> Iterator[Reuse]:
    """The entries with paths in place of layer numbers.

    Raises:
        ValueError: a pattern matches no module, or a layer's number is found in several stacks of layers.
    """
    for n, entry in enumerate(entries):
        where = f"plan reuse {n}"
        yield entry._replace(modules=bound(entry.modules, paths, where), anchor=bound(entry.anchor, paths, where))


def route_of(entries: Iterable[Reuse], site: AttentionSite) -> Route | None:
    """Whose selection a site takes; None: its own."""
    for entry in entries:
        if entry.phase == site.phase and under(entry.modules, site.module, site.index):
            return Route(str(entry.anchor), functools.partial(_is_under, entry.anchor), entry.heads)
    return None


def _is_under(pattern: str | int, site: AttentionSite) -> bool:
    return under(pattern, site.module, site.index)
