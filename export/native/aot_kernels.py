"""Which kernels the native library holds for one form of attention site, with their compile-time constants.

Mirrors kernels/*/host.py, fused.py, strip.py and hopper.py; csrc/cuda.cc mirrors the order and the grids of the launches.
tests/export/test_native_cuda.py compares both with what the host code launches, and runs them against the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

from tsa_compile.export.native.aot_form import AotKernel, Form, widths
from tsa_compile.kernels.attend.tokens import hopper
from tsa_compile.kernels.common.tiles import precision, prefill_config, strip_config
from tsa_compile.kernels.score.last_queries import hopper as scores_hopper
from tsa_compile.kernels.score.last_queries.host import score_config

_STRIP_BINDS = {
    "window": "strip_window", "sinks": "strip_sinks", "order": "strip_order",
    "ranks": "strip_ranks", "part": "out", "part_lse": "lse", "s_sb": "i_sb", "s_sg": "i_sg", "p_sb": "o_sb", "p_sh": "o_sh",
}  # fmt: skip


def takes_hopper(form: Form, capability: tuple[int, int]) -> bool:
    """As `hopper.takes`, for contiguous operands."""
    half, square = form.dtype in ("fp16", "bf16"), form.dim == form.v_dim
    return capability == (9, 0) and half and square and form.dim in hopper.HEAD_DIMS


def kernels_of(form: Form, capability: tuple[int, int]) -> Iterator[AotKernel]:
    """All kernels of a form, for GPUs of one compute capability."""
    from tsa_compile.export.native.rank_device import rank_kernel
    from tsa_compile.kernels.attend.tokens.pack_device import invert_kernel
    from tsa_compile.kernels.common.ranks_device import order_kernel

    yield from _scores(form, capability)
    yield from _selection(form)
    yield from _prefill(form, capability)
    if form.masked:
        yield AotKernel("rank", rank_kernel, {"BLOCK": 4096}, {"num_warps": 8}, form)
        yield AotKernel("order", order_kernel, {"BLOCK": 1024}, {}, form, (1024, 0))
    if form.strip:
        yield AotKernel("invert", invert_kernel, {"BLOCK": 1024}, {}, form, (1024, 0), {"s_sb": "i_sb", "s_sg": "i_sg"})
        yield _strip(form, capability)


def _scores(form: Form, capability: tuple[int, int]) -> Iterator[AotKernel]:
    padded = {"PADDED": form.masked}
    if takes_hopper(form, capability) and form.last_queries <= scores_hopper.BLOCK:
        from tsa_compile.kernels.score.last_queries.hopper_device import score_hopper_kernel
        from tsa_compile.kernels.score.last_queries.hopper_ring_device import WARPS

        together, stages = scores_hopper.tiles(form.group, form.dim, form.torch_dtype.itemsize)
        constants = {"D": form.dim, "HEADS": together, "STAGES": stages, "SPLITS": scores_hopper.MAX_SPLITS, **padded}
        options, blocks = {"num_warps": WARPS.value}, (together, scores_hopper.BLOCK)
        binds = {"through": "counts"}  # not read by one pass alone
        for name, first in (("score_lse_hopper", True), ("score_mean_hopper", False)):
            one_pass = {**constants, "LSE": first, "MEAN": not first}
            yield AotKernel(name, score_hopper_kernel, one_pass, options, form, blocks, binds)
        return
    from tsa_compile.kernels.score.last_queries import device as scores

    config = score_config(form.dim, form.torch_dtype, form.last_queries, capability)
    tile = {
        "D": form.dim, "BLOCK_D": config.block_d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "PRECISION": precision(form.torch_dtype),
    }  # fmt: skip
    options, blocks = {"num_warps": config.num_warps, "num_stages": config.num_stages}, (config.block_m, config.block_n)
    for name, function in (("score_lse", scores.score_lse_kernel), ("score_mean", scores.score_mean_kernel)):
        yield AotKernel(name, function, {**tile, **padded, **_row_strides(form, "qk")}, options, form, blocks)


def _selection(form: Form) -> Iterator[AotKernel]:
    from tsa_compile.kernels.select.tokens import count_device, device, host

    padded = {"PADDED": form.masked}
    pool = {"HEADS": host.POOL_HEADS, "BLOCK": host.POOL_BLOCK, **padded}
    yield AotKernel("pool", count_device.pool_kernel, pool, {"num_warps": host.POOL_WARPS}, form, (host.POOL_BLOCK, 0))
    count = {"BLOCK": host.COUNT_BLOCK, **padded}
    yield AotKernel("count", count_device.count_kernel, count, {"num_warps": host.COUNT_WARPS}, form, (host.COUNT_BLOCK, 0))
    chunk = {"CHUNK": host.CHUNK, "BLOCK": host.SELECT_BLOCK, **padded}
    for name in ("select", "bin", "cut", "write"):
        yield AotKernel(name, getattr(device, f"{name}_kernel"), chunk, {"num_warps": host.SELECT_WARPS}, form, (host.CHUNK, 0))


def _prefill(form: Form, capability: tuple[int, int]) -> Iterator[AotKernel]:
    block_d, block_dv = _block(form.dim), _block(form.v_dim)
    if takes_hopper(form, capability):
        from tsa_compile.kernels.attend.tokens.hopper_device import sparse_prefill_hopper_kernel as function

        constants: dict[str, int | str] = {"D": form.dim, "STAGES": hopper.STAGES, "STRIP": form.strip, "PACKED": False}
        blocks = (hopper.BLOCK, hopper.BLOCK)
        yield AotKernel("prefill_hopper", function, constants, {"num_warps": 4}, form, blocks, {"lse": "lse_or_out"})
        return
    from tsa_compile.kernels.attend.tokens.device import sparse_prefill_kernel

    config = prefill_config(max(block_d, block_dv), form.torch_dtype, capability)
    constants = {
        "D": form.dim, "DV": form.v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "STRIP": form.strip, "PRECISION": precision(form.torch_dtype),
    }  # fmt: skip
    options = config.options
    blocks = (config.block_m, config.block_n)
    constants.update(_row_strides(form, "qkvo"))
    yield AotKernel("prefill", sparse_prefill_kernel, constants, options, form, blocks, {"lse": "lse_or_out"})


def _strip(form: Form, capability: tuple[int, int]) -> AotKernel:
    from tsa_compile.kernels.attend.tokens.strip_device import strip_kernel

    block_d, block_dv = _block(form.dim), _block(form.v_dim)
    config = strip_config(max(block_d, block_dv), form.torch_dtype, capability)
    constants = {
        "D": form.dim, "DV": form.v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "PADDED": form.masked, "PACKED": False, "PRECISION": precision(form.torch_dtype),
        "lse": None,
    }  # fmt: skip
    options = config.options
    blocks = (config.block_m, config.block_n)
    return AotKernel("strip", strip_kernel, {**constants, **_row_strides(form, "qkvop")}, options, form, blocks, _STRIP_BINDS)


def _row_strides(form: Form, tensors: str) -> dict[str, int]:
    """Strides that contiguous tensors fix: between rows, and (but for outputs) between elements."""
    width = widths(form)
    strides = {f"{t}_sl": width[t] for t in tensors}
    return {**strides, **{f"{t}_sd": 1 for t in tensors if t in "qkv"}}


def _block(dim: int) -> int:
    """The power of two, at least 16, that holds a head dim."""
    return max(16, 1 << (dim - 1).bit_length())
