"""Tensor parallelism: over which processes the heads of a model are spread."""

from __future__ import annotations

from typing import Any

from torch import nn

_DIM = "tp"  # what transformers and PyTorch's own examples call it in a device mesh


def head_group(model: nn.Module) -> str | None:
    """The name of the process group whose ranks hold the heads of `model` together; None: this process has them all.

    Known are models that transformers spreads (`tp_plan="auto"`), and parameters in a device mesh that has a dimension "tp", as
    `torch.distributed.tensor.parallel.parallelize_module` makes them.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None and mesh.ndim == 1 and (getattr(model, "_tp_size", None) or 1) > 1:
        return str(mesh.get_group().group_name)
    meshes = [mesh, *(getattr(p, "device_mesh", None) for p in model.parameters())]
    return next((name for name in map(_of_mesh, meshes) if name is not None), None)


def _of_mesh(mesh: Any) -> str | None:
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return str(mesh.get_group(_DIM).group_name) if _DIM in names and mesh.size(names.index(_DIM)) > 1 else None
