"""The node `ai.tsa::TokenSparseAttention` version 1: schema, and the translation from the PyTorch operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tsa_compile.export.body import DOMAIN, DOMAIN_VERSION, OP_TYPE, Variant
from tsa_compile.export.require import require

if TYPE_CHECKING:
    import onnx_ir as ir

STRIP = ("strip_window", "strip_sinks", "heavy")
INTS = ("window", "pool", "min_tokens", *STRIP)
TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def translation() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`: one node, all attributes on it.

    The attribute `coverage` is a float64 tensor: the selection rule is in float64, ONNX's float attributes are float32.
    """
    import torch

    onnx, onnxscript, np = (require(m, "onnx") for m in ("onnx", "onnxscript", "numpy"))
    op = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), OP_TYPE, _schema(onnx.defs))

    def token_sparse_attention(
        q: Any, k: Any, v: Any, key_mask: Any, scale: float, coverage: float, window: int, pool: int, min_tokens: int,
        strip_window: int, strip_sinks: int, heavy: int, engine: str,
    ) -> Any:  # fmt: skip
        operands = (q, k, v) if key_mask is None else (q, k, v, key_mask)
        exact = onnx.numpy_helper.from_array(np.array(coverage, np.float64))
        return op(
            *operands, scale=scale, coverage=exact, window=window, pool=pool, min_tokens=min_tokens,
            strip_window=strip_window, strip_sinks=strip_sinks, heavy=heavy,
        )  # fmt: skip

    return {torch.ops.tsa.token_sparse_attention.default: token_sparse_attention}


def _schema(defs: Any) -> Any:
    """The operator's schema, by which torch.onnx knows inputs, outputs and attributes."""
    parameter, kind = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType
    optional = defs.OpSchema.FormalParameterOption.Optional
    return defs.OpSchema(
        OP_TYPE,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[
            *(parameter(name, "T") for name in "qkv"),
            parameter("key_mask", "tensor(bool)", param_option=optional),
        ],
        outputs=[parameter("result", "T")],
        type_constraints=[("T", TYPES, "")],
        attributes=[
            defs.OpSchema.Attribute("scale", kind.FLOAT),
            defs.OpSchema.Attribute("coverage", kind.TENSOR),
            *(defs.OpSchema.Attribute(name, kind.INT) for name in INTS),
        ],
    )


def sites(model: ir.Model) -> list[ir.Node]:
    """All nodes of the operator, inner graphs included."""
    return [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type.startswith(OP_TYPE)]


def variant_of(node: ir.Node, target: str) -> Variant:
    """The body that fits the node's inputs and attributes."""
    masked = len(node.inputs) > 3 and node.inputs[3] is not None
    return Variant(masked, any(node.attributes[name].as_int() for name in STRIP), target)


def bind(node: ir.Node, variant: Variant) -> None:
    """Make the node call the variant's body: its name or overload, and the attributes that body reads."""
    ir = require("onnx_ir", "onnx")
    _, node.op_type, node.overload = variant.identifier
    if "coverage_q56" in variant.attributes:
        coverage = float(node.attributes["coverage"].as_tensor().numpy())
        node.attributes.add(ir.AttrInt64("coverage_q56", round(coverage * 2**56)))
