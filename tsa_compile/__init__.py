"""tsa_compile: attention that reads only the tokens that matter, for any PyTorch model."""

import os as _os

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "kernels")) and _os.path.isfile(
    _os.path.join(_root, "pyproject.toml")
):
    __path__.append(_root)  # a checkout: passes/, kernels/ and export/ lie beside this folder
