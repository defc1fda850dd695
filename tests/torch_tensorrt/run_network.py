"""Runs a network of TensorRT on the CPU, layer by layer, in PyTorch, with the dtypes that the network says.

An engine needs a GPU; its network says what the engine is to compute, so what the conversion did to the graph is seen without
one: an int64 that became an int32, for instance. What a builder makes of the network is not. Knows the layers that our tests'
networks have, as TensorRT documents them; another raises.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import tensorrt as trt
import torch
import torch.nn.functional as F

Tensor = torch.Tensor
DTYPES = {
    trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.int64: torch.int64,
    trt.int32: torch.int32, trt.bool: torch.bool,
}  # fmt: skip
E, U, R, A = trt.ElementWiseOperation, trt.UnaryOperation, trt.ReduceOperation, trt.ActivationType
BINARY: dict[Any, Callable[..., Tensor]] = {
    E.SUM: torch.add, E.PROD: torch.mul, E.MAX: torch.maximum, E.MIN: torch.minimum, E.SUB: torch.sub, E.POW: torch.pow,
    E.AND: torch.logical_and, E.OR: torch.logical_or, E.XOR: torch.logical_xor, E.EQUAL: torch.eq, E.GREATER: torch.gt,
    E.LESS: torch.lt, E.FLOOR_DIV: lambda a, b: torch.div(a, b, rounding_mode="floor"),
    E.DIV: lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
}  # fmt: skip
UNARY: dict[Any, Callable[..., Tensor]] = {
    U.EXP: torch.exp, U.LOG: torch.log, U.SQRT: torch.sqrt, U.RECIP: torch.reciprocal, U.ABS: torch.abs, U.NEG: torch.neg,
    U.SIN: torch.sin, U.COS: torch.cos, U.FLOOR: torch.floor, U.CEIL: torch.ceil, U.NOT: torch.logical_not, U.ERF: torch.erf,
    U.ISNAN: torch.isnan, U.ISINF: torch.isinf, U.SIGN: torch.sign,
}  # fmt: skip
REDUCE: dict[Any, Callable[..., Tensor]] = {R.SUM: torch.sum, R.MAX: torch.amax, R.MIN: torch.amin, R.AVG: torch.mean}
ACTIVATION: dict[Any, Callable[..., Tensor]] = {
    A.RELU: torch.relu, A.SIGMOID: torch.sigmoid, A.TANH: torch.tanh, A.GELU_ERF: F.gelu,
}  # fmt: skip


def run_network(network: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The network's outputs.

    Raises:
        KeyError: a layer, operation or dtype that this file has not.
        AssertionError: a result does not have the dtype that the network says.
    """
    values = {network.get_input(i).name: x for i, x in enumerate(inputs)}
    waiting = [network.get_layer(i) for i in reversed(range(network.num_layers))]  # not in the order in which they run
    makers = {layer.get_output(0).name: layer for layer in waiting}
    while waiting:
        layer = waiting[-1]
        operands = [layer.get_input(j) for j in range(layer.num_inputs)]
        missing = [x.name for x in operands if x is not None and x.name not in values]
        if missing:
            waiting += [makers[name] for name in missing]
            continue
        waiting.pop()
        output = layer.get_output(0)
        if output.name not in values:
            values[output.name] = _run(layer, [None if x is None else values[x.name] for x in operands])
    return [values[network.get_output(i).name] for i in range(network.num_outputs)]


def _run(layer: Any, operands: list[Tensor | None]) -> Tensor:
    kind, compute = LAYERS[layer.type]
    layer.__class__ = getattr(trt, kind)  # the binding gives the base class
    result = compute(layer, *operands)
    assert result.dtype == _out(layer), f"{layer.name}: {result.dtype} where the network says {_out(layer)}"
    return result


def _axes(mask: int) -> list[int]:
    return [i for i in range(8) if mask >> i & 1]


def _out(layer: Any) -> torch.dtype:
    return DTYPES[layer.get_output(0).dtype]


def _constant(layer: Any) -> Tensor:
    return torch.tensor(layer.weights).to(_out(layer)).reshape(tuple(layer.shape))


def _shuffle(layer: Any, x: Tensor, dims: Tensor | None = None) -> Tensor:
    x = x.permute(list(layer.first_transpose)[: x.dim()])
    shape = layer.reshape_dims if dims is None else dims.tolist()
    if shape is not None:
        shape = [x.shape[i] if n == 0 and layer.zero_is_placeholder else n for i, n in enumerate(shape)]
        x = x.reshape(shape)
    return x.permute(list(layer.second_transpose)[: x.dim()])


def _slice(layer: Any, x: Tensor, *dynamic: Tensor | None) -> Tensor:
    given = [layer.start, layer.shape, layer.stride]
    for i, values in enumerate(dynamic[:3]):
        given[i] = given[i] if values is None else values.tolist()
    assert len(dynamic) < 4, "a fill value, or axes"
    for dim, (start, size, step) in enumerate(zip(*map(list, given), strict=True)):
        at = start + step * torch.arange(size)
        if layer.mode == trt.SampleMode.CLAMP:
            at = at.clamp(0, x.shape[dim] - 1)
        assert layer.mode in (trt.SampleMode.CLAMP, trt.SampleMode.STRICT_BOUNDS)
        x = x.index_select(dim, at)
    return x


def _gather(layer: Any, x: Tensor, index: Tensor) -> Tensor:
    if layer.mode == trt.GatherMode.ELEMENT:
        return x.gather(layer.axis, index.long())
    assert (layer.mode, layer.num_elementwise_dims) == (trt.GatherMode.DEFAULT, 0)
    if index.dim() == 0:
        return x.select(layer.axis, int(index))
    return x.index_select(layer.axis, index.long().flatten()).unflatten(layer.axis, index.shape)


def _scatter(layer: Any, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    assert layer.mode == trt.ScatterMode.ELEMENT
    return x.scatter(layer.axis, index.long(), updates)


def _reduce(layer: Any, x: Tensor) -> Tensor:
    return REDUCE[layer.op](x, _axes(layer.axes), layer.keep_dims).to(x.dtype)


def _product(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    turned = [x.transpose(-1, -2) if op == trt.MatrixOperation.TRANSPOSE else x for x, op in ((a, layer.op0), (b, layer.op1))]
    assert trt.MatrixOperation.VECTOR not in (layer.op0, layer.op1)
    return operator.matmul(*turned)


def _normalize(layer: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    axes = _axes(layer.axes)
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + layer.epsilon).sqrt() * scale + bias


def _fill(layer: Any, shape: Tensor | None = None, start: Tensor | None = None, step: Tensor | None = None) -> Tensor:
    assert layer.operation == trt.FillOperation.LINSPACE
    sizes = list(layer.shape) if shape is None else shape.tolist()
    first = layer.alpha if start is None else start
    deltas = [layer.beta] if step is None else list(step.flatten())
    deltas += [0] * (len(sizes) - len(deltas))
    x = torch.zeros(sizes, dtype=torch.int64) + first
    for dim, (size, delta) in enumerate(zip(sizes, deltas, strict=True)):
        x = x + (torch.arange(size) * delta).reshape(-1, *[1] * (len(sizes) - 1 - dim))
    return x.to(_out(layer))


def _convolution(layer: Any, x: Tensor, kernel: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    assert layer.num_groups == 1
    if kernel is None:
        kernel = torch.tensor(layer.kernel).reshape(layer.num_output_maps, x.shape[1], *layer.kernel_size_nd)
    if bias is None and len(layer.bias):
        bias = torch.tensor(layer.bias)
    return F.conv2d(x, kernel, bias, tuple(layer.stride_nd), tuple(layer.padding_nd))


def _pool(layer: Any, x: Tensor) -> Tensor:
    assert layer.type == trt.PoolingType.AVERAGE
    size = (tuple(layer.window_size_nd), tuple(layer.stride_nd), tuple(layer.padding_nd))
    return F.avg_pool2d(x, *size, count_include_pad=not layer.average_count_excludes_padding)


def _squeezed(layer: Any, x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.flatten().tolist()):
        x = x.unsqueeze(axis)
    return x


def _running_sum(layer: Any, x: Tensor, axis: Tensor) -> Tensor:
    assert (layer.op, layer.exclusive, layer.reverse) == (trt.CumulativeOperation.SUM, False, False)
    return x.cumsum(int(axis)).to(x.dtype)


def _soft(layer: Any, x: Tensor) -> Tensor:
    (axis,) = _axes(layer.axes)
    return x.softmax(axis)


L = trt.LayerType
LAYERS: dict[Any, tuple[str, Callable[..., Tensor]]] = {
    L.CONSTANT: ("IConstantLayer", _constant),
    L.CAST: ("ICastLayer", lambda layer, x: x.to(_out(layer))),
    L.IDENTITY: ("IIdentityLayer", lambda layer, x: x.to(_out(layer))),
    L.CONCATENATION: ("IConcatenationLayer", lambda layer, *x: torch.cat(x, layer.axis)),
    L.SHAPE: ("IShapeLayer", lambda layer, x: torch.tensor(x.shape, dtype=torch.int64)),
    L.SHUFFLE: ("IShuffleLayer", _shuffle),
    L.SLICE: ("ISliceLayer", _slice),
    L.GATHER: ("IGatherLayer", _gather),
    L.SCATTER: ("IScatterLayer", _scatter),
    L.ELEMENTWISE: ("IElementWiseLayer", lambda layer, a, b: BINARY[layer.op](a, b)),
    L.UNARY: ("IUnaryLayer", lambda layer, x: UNARY[layer.op](x)),
    L.ACTIVATION: ("IActivationLayer", lambda layer, x: ACTIVATION[layer.type](x)),
    L.REDUCE: ("IReduceLayer", _reduce),
    L.SOFTMAX: ("ISoftMaxLayer", _soft),
    L.MATRIX_MULTIPLY: ("IMatrixMultiplyLayer", _product),
    L.NORMALIZATION: ("INormalizationLayer", _normalize),
    L.FILL: ("IFillLayer", _fill),
    L.SELECT: ("ISelectLayer", lambda layer, c, a, b: torch.where(c, a, b)),
    L.UNSQUEEZE: ("IUnsqueezeLayer", _squeezed),
    L.CUMULATIVE: ("ICumulativeLayer", _running_sum),
    L.CONVOLUTION: ("IConvolutionLayer", _convolution),
    L.POOLING: ("IPoolingLayer", _pool),
}
