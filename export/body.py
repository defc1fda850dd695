"""The portable body of `ai.tsa::TokenSparseAttention`: an ONNX function of standard operators only.

A stock runtime executes it with no library of ours. docs/operators.md is the contract; the parts are in `body_select`,
`body_rank`, `body_attend` and `body_strip`. Nothing depends on the length: sizes are read from the inputs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tsa_compile.export.body_attend import attend_kept, scatter
from tsa_compile.export.body_call import Call
from tsa_compile.export.body_plugin import attend_by_plugins
from tsa_compile.export.body_rank import Bisect, Sort
from tsa_compile.export.body_select import select_tokens
from tsa_compile.export.body_strip import complete
from tsa_compile.export.ops import Ops
from tsa_compile.export.require import require

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, OP_TYPE, DOMAIN_VERSION = "ai.tsa", "TokenSparseAttention", 1
TARGETS = ("onnxruntime", "tensorrt", "tensorrt_plugin")


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
        attended = attend_kept(call, kept, with_totals=variant.strip)
        out = complete(call, kept, attended) if variant.strip else scatter(call, kept, attended)
    inputs = [q, k, v] if key_mask is None else [q, k, v, key_mask]
    out.name = "result"
    graph = op.graph(inputs, [out], "body")
    domain, name, overload = variant.identifier
    kinds = {"scale": ir.AttributeType.FLOAT, "coverage": ir.AttributeType.TENSOR}
    attributes = [ir.Attr(a, kinds.get(a, ir.AttributeType.INT), None) for a in variant.attributes]
    return ir.Function(domain, name, overload, graph=graph, attributes=attributes)
