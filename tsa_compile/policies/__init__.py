"""Policies: one idea, one file. Every module of this folder is imported, so a new file is a new policy."""

import importlib as _importlib
import pkgutil as _pkgutil

for _module in _pkgutil.iter_modules(__path__):
    _importlib.import_module(f"{__name__}.{_module.name}")
