"""Engines run in this process, on the CPU, as vLLM's environment variables ask; they are read when vLLM is imported."""

from __future__ import annotations

import os

import pytest

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",
)  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small Llama on disk; the plug-in must be installed, as vLLM finds it by its entry point."""
    pytest.importorskip("vllm")
    from importlib.metadata import entry_points

    from tests.vllm.engines import save_model

    assert [e.name for e in entry_points(group="vllm.general_plugins") if e.value.startswith("tsa_compile.")], "make test-vllm"
    return save_model(tmp_path_factory.mktemp("llama"))
