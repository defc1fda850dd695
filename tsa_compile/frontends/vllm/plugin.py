"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`): registers the attention backend CUSTOM."""

from __future__ import annotations

import functools
import logging
import re
import sys
from typing import Any

log = logging.getLogger("vllm.tsa_compile")  # below vllm's own logger, so that its handlers show it
VERSIONS = ((0, 26), (0, 33))
HERE = "tsa_compile.frontends.vllm"


def register() -> None:
    """Make `--attention-backend CUSTOM` ours; on CPU, where vLLM always takes its own, also its override.

    May be called more than once. A vLLM of another version: one warning, and nothing is registered.
    """
    from vllm.version import __version__

    if not supported(__version__):
        low, high = (".".join(map(str, v)) for v in VERSIONS)
        log.warning(
            "tsa_compile is for vLLM %s to %s, not %s: attention backend CUSTOM is not registered", low, high, __version__
        )
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{HERE}.cpu_backend.CpuBackend")
    path = "cpu_backend.CpuBackend" if current_platform.is_cpu() else "cuda_backend.CudaBackend"
    register_backend(AttentionBackendEnum.CUSTOM, f"{HERE}.{path}")
    _check_before_the_engine(sys.modules.get("vllm.engine.arg_utils"))


def supported(version: str) -> bool:
    """Whether the plug-in was written for this version of vLLM."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and VERSIONS[0] <= (int(found[1]), int(found[2])) <= VERSIONS[1]


def _check_before_the_engine(arguments: Any) -> None:
    """Read our options before vLLM starts any process: a wrong one is then an error of one sentence, where the user looks.

    arguments: vLLM's module of that name, or None in a process that has no need of it. The engine reads them again.
    """
    create = getattr(getattr(arguments, "EngineArgs", None), "create_engine_config", None)
    if create is None or hasattr(create, "checks_tsa"):
        return
    from tsa_compile.frontends.vllm.options import check_arguments, check_model

    @functools.wraps(create)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_arguments(self)
        config = create(self, *args, **kwargs)
        check_model(config)
        return config

    marked: Any = checked
    marked.checks_tsa = True
    arguments.EngineArgs.create_engine_config = marked
