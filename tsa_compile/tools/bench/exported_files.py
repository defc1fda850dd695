"""What `tsa-compile bench export` exports: one attention, and models of real shapes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tsa_compile import export
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.tools.bench.prefill import LLAMA_8B

HEADS, KV_HEADS, DIM = 32, 8, 128
SMOLLM2 = {
    **LLAMA_8B, "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M shape": SMOLLM2,
    "Llama-3.1-8B shape": {**LLAMA_8B, "vocab_size": 16_384},  # a smaller vocabulary: the head is not what is measured
}
DTYPES = {"SmolLM2-135M shape": ("float32", "float16")}  # of the others: both half types
LAYERS = 4
POLICIES = {  # random weights attend flatly, so `coverage` drops about as large a share of the tokens
    "paper": TokenSparse.paper(coverage=0.5, engine="fused"),
    "completed": TokenSparse(coverage=0.5, engine="fused"),
}


class Attention(nn.Module):
    """One causal attention with grouped heads."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class LastLogits(nn.Module):
    """Float32 logits of the last 64 positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False, logits_to_keep=64).logits.float()


def export_attention(folder: Path, dtype: torch.dtype, kind: str) -> Path:
    """One attention as ONNX: kind "dense" (operator Attention of opset 23) or "FORM POLICY"."""
    path = folder / f"{kind.replace(' ', '_')}_{dtype}.onnx"
    q, k, v = (torch.randn(1, h, 64, DIM, dtype=dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    free = torch.export.Dim("length", max=1 << 20)
    shapes = tuple({2: free} for _ in range(3))
    if kind == "dense":
        program = torch.onnx.export(
            Attention(), (q, k, v), dynamo=True, dynamic_shapes=shapes, opset_version=23, optimize=False, verbose=False
        )
        assert program is not None
        program.save(str(path))
    else:
        form, policy = kind.split()
        export.onnx(Attention(), (q, k, v), path, policy=POLICIES[policy], form=form, dynamic_shapes=shapes)
    return path


def load_model(name: str, dtype: torch.dtype) -> LastLogits:
    """One of MODELS, with the same random weights in every process; or a model by packaged name, folder or Hugging Face id."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tsa_compile.tools.load_models import load_causal_lm

    if name not in MODELS:
        return LastLogits(load_causal_lm(name, dtype))
    torch.cuda.manual_seed(0)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(LlamaConfig(**{**MODELS[name], "num_hidden_layers": LAYERS}))
    return LastLogits(model.to(dtype)).eval()


def export_model(folder: Path, name: str, dtype: torch.dtype, form: str) -> Path:
    path = folder / f"{Path(name).name.replace(' ', '_')}_{dtype}_{form}" / "model.onnx"
    path.parent.mkdir()
    free = torch.export.Dim.DYNAMIC
    ids = torch.randint(0, 1000, (2, 300))
    model = load_model(name, dtype).cpu()
    export.onnx(model, (ids,), path, policy=POLICIES["completed"], form=form, dynamic_shapes=({0: free, 1: free},))
    return path


def build(path: Path) -> Path:
    """The native library for a file, for this GPU."""
    from tsa_compile.export import native

    return native.build_library(native.forms_of(path), [torch.cuda.get_device_capability()])


def prepare(job: tuple[str, ...]) -> tuple[Path, Path | None]:
    """One export and, for the custom form, its library; in a process of its own."""
    folder, kind, dtype = Path(job[0]), job[2], getattr(torch, job[3])
    path = export_attention(folder, dtype, kind) if job[1] == "attention" else export_model(folder, job[1], dtype, kind)
    return path, build(path) if kind.startswith("custom") else None
