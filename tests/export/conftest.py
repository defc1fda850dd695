"""What the export tests share: models of one attention site, its operands, and the reference."""

import numpy as np
import pytest
import torch

SCALE = 0.25
PAPER = {"coverage": 0.3, "window": 16, "pool": 7, "min_tokens": 32, "strip_window": 0, "strip_sinks": 0, "heavy": 0}
STRIP = {**PAPER, "strip_window": 24, "strip_sinks": 4, "heavy": 20}
ELEMENT = {torch.float32: 1, torch.float16: 10}
SHAPES = {
    "q": ["B", "H", "Lq", "D"],
    "k": ["B", "Hk", "Lk", "D"],
    "v": ["B", "Hk", "Lk", "Dv"],
    "key_mask": ["B", "Lk"],
}


class Site:
    """One attention site: a model of one node, operands, the reference."""

    scale, paper, strip = SCALE, PAPER, STRIP

    @staticmethod
    def attributes(settings):
        import onnx

        return {
            **settings,
            "scale": SCALE,
            "coverage": onnx.numpy_helper.from_array(np.array(settings["coverage"])),
            "coverage_q56": round(settings["coverage"] * 2**56),
        }

    @staticmethod
    def model(nodes, functions, masked, dtype=torch.float32, opset=21):
        """A model of the inputs q, k, v (and key_mask), these nodes, and each node's output."""
        import onnx

        info = onnx.helper.make_tensor_value_info
        inputs = ["q", "k", "v", *(["key_mask"] if masked else [])]
        graph = onnx.helper.make_graph(
            nodes,
            "g",
            [info(n, 9 if n == "key_mask" else ELEMENT[dtype], SHAPES[n]) for n in inputs],
            [info(n.output[0], ELEMENT[dtype], ["B", "H", "Lq", "Dv"]) for n in nodes if n.domain],
        )
        imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("ai.tsa", 1)]
        return onnx.helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)

    @staticmethod
    def node(variant, settings, out="out"):
        """A node that calls the variant's body."""
        import onnx

        inputs = ["q", "k", "v", *(["key_mask"] if variant.masked else [])]
        values = Site.attributes(settings)
        domain, name, overload = variant.identifier
        made = onnx.helper.make_node(
            name, inputs, [out], name=f"site_{out}", domain=domain, **{a: values[a] for a in variant.attributes}
        )
        made.overload = overload
        return made

    @staticmethod
    def portable(variant, settings, dtype=torch.float32, opset=21):
        """A model of one node and its body."""
        import onnx_ir

        from tsa_compile.export.onnx_model.node import function

        body = onnx_ir.to_proto(function(variant, opset))
        return Site.model([Site.node(variant, settings)], [body], variant.masked, dtype, opset)

    @staticmethod
    def operands(batch, q_len, k_len, heads=4, kv_heads=2, dim=16, v_dim=24, dtype=torch.float32):
        q = 2 * torch.randn(batch, heads, q_len, dim)
        k = 2 * torch.randn(batch, kv_heads, k_len, dim)
        return tuple(x.to(dtype) for x in (q, k, torch.randn(batch, kv_heads, k_len, v_dim)))

    @staticmethod
    def ragged_mask(batch, k_len):
        """Holes in row 0, left padding in row 1, right padding in row 2."""
        mask = torch.ones(batch, k_len, dtype=torch.bool)
        mask[0] = torch.rand(k_len) > 0.25
        mask[0, -1] = True
        if batch > 1:
            mask[1, : k_len // 2] = False
        if batch > 2:
            mask[2, k_len - k_len // 3 :] = False
        return mask

    @staticmethod
    def run(session, q, k, v, mask=None):
        feed = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()}
        if mask is not None:
            feed["key_mask"] = mask.numpy()
        return torch.from_numpy(session.run(None, feed)[0])

    @staticmethod
    def expected(q, k, v, mask, s):
        """What the reference operator gives."""
        import tsa_compile.kernels.ops  # noqa: F401  (registers torch.ops.tsa)

        selection = (SCALE, s["coverage"], s["window"], s["pool"], s["min_tokens"])
        strip = (s["strip_window"], s["strip_sinks"], s["heavy"])
        return torch.ops.tsa.token_sparse_attention(q, k, v, mask, *selection, *strip, "reference")

    @staticmethod
    def difference(session, q, k, v, mask, s):
        """Largest difference between a session's output and the reference operator's."""
        expected = Site.expected(q, k, v, mask, s)
        actual = Site.run(session, q, k, v, mask)
        assert actual.shape == expected.shape
        return (actual.float() - expected.float()).abs().max().item()

    @staticmethod
    def difference_beside_a_bad_head(session, s, value):
        """One key of KV head 0 is `value`: its query heads have no mass, so the others keep what they keep without them."""
        q, k, v = Site.operands(1, 300, 300)
        k[0, 0, 5] = value
        actual = Site.run(session, q, k, v)[:, 2:]
        return (actual - Site.expected(q[:, 2:], k[:, 1:], v[:, 1:], None, s)).abs().max().item()


@pytest.fixture(scope="session", autouse=True)
def native_cache(tmp_path_factory):
    """A cache of native libraries for the session: each is built once, from these sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSA_COMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def site():
    return Site
