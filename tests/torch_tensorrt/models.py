"""Small models of transformers with random weights, their example inputs, dynamic shapes and policies."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import tsa_compile as tsa
from tsa_compile.export.language_model import language_graph
from tsa_compile.policies.base import Policy

MAX_LENGTH = 8192
PAPER = tsa.TokenSparse.paper(coverage=0.3, window=16, min_tokens=32)
COMPLETED = tsa.TokenSparse(coverage=0.3, window=16, min_tokens=32, completion=tsa.Completion(24, 4, 20))
BLOCKS = tsa.BlockSparse(0.97, window=100)  # key blocks of random weights weigh about the same
OTHER_BLOCKS = tsa.BlockSparse((0.9, 0.94, 0.97, 0.99), pool=32, window=1, sinks=0, last_dense=0, share="group", lookahead=False)
BATCH, LENGTH = torch.export.Dim("batch", min=1, max=4), torch.export.Dim("length", min=2, max=MAX_LENGTH)
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
    "head_dim": 16, "initializer_range": 0.3,
}  # fmt: skip
TEXTS, IMAGES = [(2, 100), (1, 509), (2, 1500)], [(1, 3, 32, 32), (3, 3, 32, 32)]


class Logits(nn.Module):
    """A decoder's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class Case(NamedTuple):
    """A model and how it is exported; `ranges` has (smallest, usual, largest) shape and dtype of each input."""

    model: nn.Module
    args: tuple[torch.Tensor, ...]
    shapes: Any
    ranges: list[tuple[tuple[tuple[int, ...], ...], torch.dtype]]
    policy: Any

    def inputs(self, package: Any) -> list[Any]:
        """Torch-TensorRT's description of the inputs."""
        names = ("min_shape", "opt_shape", "max_shape")
        return [package.Input(**dict(zip(names, shapes, strict=True)), dtype=dtype) for shapes, dtype in self.ranges]


def llama(first: Policy = PAPER, second: Policy = COMPLETED) -> Case:
    """A prefill that returns the cache: one policy in layer 0, another in layer 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    graph = language_graph(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)).eval(), "prefill", tokens=100)
    ranges = [(((1, 2), (1, 512), (2, MAX_LENGTH)), torch.int64)]
    return Case(graph.module, graph.args, ({0: BATCH, 1: LENGTH},), ranges, _by_layer(first, second))


def qwen3(first: Policy = PAPER, second: Policy = COMPLETED) -> Case:
    """Two layers over padded rows: the mask is an input."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Logits(Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **SIZES)))
    args = (torch.randint(0, 128, (2, 100)), torch.ones(2, 100, dtype=torch.int64))
    args[1][1, :30] = 0
    ranges = [(((1, 2), (1, 512), (2, MAX_LENGTH)), torch.int64)] * 2
    return Case(model, args, ({0: BATCH, 1: LENGTH},) * 2, ranges, _by_layer(first, second))


def _by_layer(first: Policy, second: Policy) -> tsa.Plan:
    return tsa.Plan(first, rules=[("*.layers.1.*", "prefill", second)])


def vit() -> Case:
    """An encoder of 65 tokens with `ProbeSparse`, for any batch."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, **sizes)).eval()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixels).logits

    image = (3, 32, 32)
    ranges = [(((1, *image), (2, *image), (4, *image)), torch.float32)]
    policy = tsa.ProbeSparse(coverage=0.3, probes=8, min_keys=16)
    return Case(Classes(), (torch.randn(2, *image),), ({0: BATCH},), ranges, policy)


CASES = {
    "llama": llama,
    "llama of blocks": functools.partial(llama, BLOCKS, OTHER_BLOCKS),
    "qwen3": qwen3,
    "qwen3 of blocks": functools.partial(qwen3, BLOCKS, OTHER_BLOCKS),
    "vit": vit,
}


def examples(name: str, device: str = "cpu") -> Iterator[tuple[torch.Tensor, ...]]:
    """Inputs of a case in several sizes, padded on the left where there is a mask."""
    if name == "vit":
        yield from ((torch.randn(shape, device=device),) for shape in IMAGES)
        return
    for shape in TEXTS:
        ids = torch.randint(0, 128, shape, device=device)
        real = torch.arange(shape[1], device=device) > shape[1] // 5
        yield (ids,) if name.startswith("llama") else (ids, real.long().repeat(shape[0], 1))


def logits(result: Any) -> torch.Tensor:
    """The first of a model's results."""
    return result[0] if isinstance(result, (tuple, list)) else result
