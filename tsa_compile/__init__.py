"""tsa_compile: attention that reads only the tokens that matter, for any PyTorch model."""

import os as _os

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if not _os.path.isdir(_os.path.join(_os.path.dirname(__file__), "kernels")) and _os.path.isfile(
    _os.path.join(_root, "pyproject.toml")
):
    __path__.append(_root)  # a checkout: passes/, kernels/ and export/ lie beside this folder

from tsa_compile.api import explain, report, restore, transform
from tsa_compile.cache import Cache
from tsa_compile.check import compare
from tsa_compile.entry_point import register as _register
from tsa_compile.generate.speculative import generate, speculative
from tsa_compile.learn import calibrate
from tsa_compile.plan import Plan
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.bridge import Bridge
from tsa_compile.policies.context_parallel import ContextParallel
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.policies.head_split import HeadSplit
from tsa_compile.policies.page_sparse import PageSparse
from tsa_compile.policies.probe_sparse import ProbeSparse
from tsa_compile.policies.remembered import Remembered
from tsa_compile.policies.resident import Resident
from tsa_compile.policies.routed import Routed
from tsa_compile.policies.sampled_values import SampledValues
from tsa_compile.policies.token_sparse import Completion, TokenSparse
from tsa_compile.reach import reach
from tsa_compile.report import Report
from tsa_compile.warm_up import warm

__version__ = "0.1.0"
__all__ = [
    "BlockSparse",
    "Bridge",
    "Cache",
    "Completion",
    "ContextParallel",
    "Dense",
    "Exact",
    "HeadSplit",
    "PageSparse",
    "Plan",
    "ProbeSparse",
    "Remembered",
    "Report",
    "Resident",
    "Routed",
    "SampledValues",
    "TokenSparse",
    "calibrate",
    "compare",
    "explain",
    "generate",
    "reach",
    "report",
    "restore",
    "speculative",
    "transform",
    "warm",
]
_register()
