"""What Torch-TensorRT 2.14 itself cannot convert of the lowered operators, as layers of TensorRT."""

from __future__ import annotations

from typing import Any

import torch

from tsa_compile.export.torch_tensorrt_lowering.graph_passes import count_from_the_front, drop_empty_operands


def register_converters() -> None:
    """For the process: converters of a number read as a size and of running sums of integers, and `graph_passes`.

    Torch-TensorRT's own running sum is a loop of one step an element that adds in float32; sums of floats stay its own.
    """
    from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter
    from torch_tensorrt.dynamo.lowering.passes import ATEN_POST_LOWERING_PASSES

    aten, dynamic = torch.ops.aten, {"supports_dynamic_shapes": True}
    dynamo_tensorrt_converter(aten._local_scalar_dense.default, **dynamic)(_size)
    own = {"capability_validator": _is_integer, "priority": ConverterPriority.HIGH}
    dynamo_tensorrt_converter(aten.cumsum.default, **dynamic, **own)(_running_sum)
    for change in (drop_empty_operands, count_from_the_front):
        ATEN_POST_LOWERING_PASSES.add_pass_with_index(change)


def _size(context: Any, target: Any, args: tuple[Any, ...], kwargs: Any, name: str) -> Any:
    """TensorRT computes sizes from tensors: the tensor itself."""
    return args[0]


def _is_integer(node: torch.fx.Node, settings: Any) -> bool:
    value = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


def _running_sum(context: Any, target: Any, args: tuple[Any, ...], kwargs: Any, name: str) -> Any:
    import numpy as np
    import tensorrt as trt  # of torch_tensorrt: TensorRT or TensorRT-RTX

    x, dim = args[:2]
    axis = context.net.add_constant(trt.Dims(), np.array(dim % len(x.shape), dtype=np.int32))
    layer = context.net.add_cumulative(x, axis.get_output(0), trt.CumulativeOperation.SUM, False, False)
    layer.name = f"[CUMULATIVE]-[aten_ops.cumsum.default]-[{name}]"
    return layer.get_output(0)
