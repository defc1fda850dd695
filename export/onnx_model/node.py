"""The node `ai.tsa::TokenSparseAttention` version 1: its schema, the translation from the PyTorch operator, its portable body.

The body is an ONNX function of standard operators only, so a stock runtime executes it with no library of ours. docs/operators.md
is the contract; the parts are in `body_select`, `body_rank`, `body_attend` and `body_strip`. Nothing depends on the length:
sizes are read from the inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tsa_compile.export.common import require
from tsa_compile.export.onnx_model.body_attend import attend_by_plugins, attend_kept, scatter
from tsa_compile.export.onnx_model.body_call import Call
from tsa_compile.export.onnx_model.body_rank import Bisect, Sort
from tsa_compile.export.onnx_model.body_select import select_tokens
from tsa_compile.export.onnx_model.body_strip import complete
from tsa_compile.export.onnx_model.emitter import Ops

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, OP_TYPE, DOMAIN_VERSION = "ai.tsa", "TokenSparseAttention", 1
META = "tsa_compile."  # prefix of a file's metadata keys: version, plan, form, target, sites
TARGETS = ("onnxruntime", "tensorrt", "tensorrt_plugin")
STRIP = ("strip_window", "strip_sinks", "heavy")
INTS = ("window", "pool", "min_tokens", *STRIP)
TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a body computes and for whom.

    Args:
        masked: it has the input `key_mask`.
        strip: it completes rows with the strip; without, rows that are not kept are zero.
        target: "onnxruntime" sorts; "tensorrt" bisects, since TensorRT's TopK stops at 3,840; "tensorrt_plugin" does too,
            and leaves the attention to plugins (`tensorrt_plugin`).
    """

    masked: bool
    strip: bool
    target: str = "onnxruntime"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, got {self.target!r}")

    @property
    def name(self) -> str:
        """ "", "masked", "completed" or "masked_completed"."""
        return "_".join(["masked"] * self.masked + ["completed"] * self.strip)

    @property
    def identifier(self) -> tuple[str, str, str]:
        """Domain, operator name, overload. TensorRT's parser ignores overloads, so there the variant is in the name."""
        if self.target != "onnxruntime":
            return DOMAIN, OP_TYPE + "".join(part.capitalize() for part in self.name.split("_")), ""
        return DOMAIN, OP_TYPE, self.name

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes the body reads; the node must carry them all (not every runtime applies a function's defaults)."""
        coverage = "coverage" if self.target == "onnxruntime" else "coverage_q56"
        strip = ("strip_window", "strip_sinks", "heavy") if self.strip else ()
        return ("scale", coverage, "window", "pool", "min_tokens", *strip)


def function(variant: Variant, opset: int = 21) -> ir.Function:
    """The function body.

    Inputs q [B, H, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv] (float32, float16 or bfloat16), and key_mask [B, Lk]
    bool if `variant.masked`; output [B, H, Lq, Dv].
    """
    ir = require("onnx_ir", "onnx")
    op = Ops(opset)
    q, k, v = (ir.Value(name=name) for name in "qkv")
    key_mask = ir.Value(name="key_mask") if variant.masked else None
    call = Call(op, q, k, v, key_mask, checked=variant.target == "onnxruntime")
    ranking = Sort() if variant.target == "onnxruntime" else Bisect()
    kept = select_tokens(call, ranking, with_heavy=variant.strip)
    if variant.target == "tensorrt_plugin":
        out = attend_by_plugins(call, kept)
    else:
        attended = attend_kept(call, kept)
        out = complete(call, kept, attended) if variant.strip else scatter(call, kept, attended)
    inputs = [q, k, v] if key_mask is None else [q, k, v, key_mask]
    out.name = "result"
    graph = op.graph(inputs, [out], "body")
    domain, name, overload = variant.identifier
    kinds = {"scale": ir.AttributeType.FLOAT, "coverage": ir.AttributeType.TENSOR}
    attributes = [ir.Attr(a, kinds.get(a, ir.AttributeType.INT), None) for a in variant.attributes]
    return ir.Function(domain, name, overload, graph=graph, attributes=attributes)


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
