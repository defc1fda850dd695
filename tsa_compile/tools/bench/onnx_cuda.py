"""ONNX Runtime on its CUDA provider, fed with CUDA tensors, and what its profile says about where nodes ran."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ELEMENTS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7, torch.bool: 9}  # onnx.TensorProto


class CudaSession:
    """A session on the CUDA provider and PyTorch's stream, fed with CUDA tensors and without waiting for the device."""

    def __init__(self, path: Path, library: Path | None = None, profile: str | None = None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        stream = torch.cuda.current_stream().cuda_stream
        if stream == 0:
            raise RuntimeError("ONNX Runtime takes no default stream: use torch.cuda.stream(torch.cuda.Stream())")
        cuda = {"user_compute_stream": str(stream), "use_tf32": "0"}
        providers: list[Any] = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
        if library:
            options.register_custom_ops_library(str(library))
        self.session = ort.InferenceSession(str(path), options, providers=providers)
        if self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("ONNX Runtime could not load its CUDA provider")
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> Callable[[], None]:
        """A function that runs the session from `inputs` into `output`; all contiguous CUDA tensors."""
        binding = self.session.io_binding()
        for info, x in zip(self.session.get_inputs(), inputs, strict=True):
            binding.bind_input(info.name, "cuda", 0, ELEMENTS[x.dtype], tuple(x.shape), x.data_ptr())
        name = self.session.get_outputs()[0].name
        binding.bind_output(name, "cuda", 0, ELEMENTS[output.dtype], tuple(output.shape), output.data_ptr())
        return lambda: self.session.run_with_iobinding(binding, self._run_options)


def placement(profile: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """provider -> operator -> [count, largest output in bytes] of the sites' nodes; and copies between host and device."""
    found: dict[str, dict[str, list[int]]] = collections.defaultdict(dict)
    copies = 0
    for event in json.loads(profile.read_text()):
        told = event.get("args", {})
        if event.get("cat") != "Node" or "provider" not in told:
            continue
        copies += told["op_name"].startswith("Memcpy")
        if "TokenSparseAttention" in event["name"] + told["op_name"] or "token_sparse_attention" in event["name"]:
            seen = found[told["provider"]].setdefault(told["op_name"], [0, 0])
            seen[0], seen[1] = seen[0] + 1, max(seen[1], int(told.get("output_size", 0)))
    return dict(found), copies
