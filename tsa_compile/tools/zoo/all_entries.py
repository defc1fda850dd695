"""All entries, and which of their libraries are here."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from tsa_compile.tools.zoo.entries import Entry
from tsa_compile.tools.zoo.plain_models import PLAIN
from tsa_compile.tools.zoo.transformers_decoders import DECODERS
from tsa_compile.tools.zoo.transformers_models import OTHERS
from tsa_compile.tools.zoo.vision_models import VISION

ENTRIES: tuple[Entry, ...] = (*DECODERS, *OTHERS, *VISION, *PLAIN)
LIBRARIES = tuple(dict.fromkeys(e.library for e in ENTRIES))


def select_entries(only: str | None) -> list[Entry]:
    """Entries whose name contains `only`, in any case; several, comma separated.

    Raises:
        ValueError: there is none.
    """
    wanted = [part.strip().lower() for part in (only or "").split(",")]
    found = [e for e in ENTRIES if any(part in e.name.lower() for part in wanted)]
    if not found:
        raise ValueError(f"no model of the zoo has {only!r} in its name; the names are {', '.join(e.name for e in ENTRIES)}")
    return found


@functools.cache
def missing(library: str) -> str | None:
    """Why `library` cannot be used here, or None."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        return f"{library} is not installed" if error.name == library else f"{library} does not import: {error}"
    except Exception as error:  # a package built for another torch fails in its own ways
        return f"{library} does not import: {error}"
    return None


def version(library: str) -> str:
    """Such as "transformers 5.23.0"."""
    return f"{library} {importlib.metadata.version(library)}"
