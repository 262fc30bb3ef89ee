"""group_norm of a DTensor: each rank normalises its part and communicates as the placements ask."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from triton_gn.ops import dispatch
from triton_gn.reference import Operands


def group_norm(operands: Operands, num_groups: int, eps: float, activation: str) -> Tensor:
    """Return y with the placements of x, for operands that ``functional`` has checked.

    Along each dimension of the mesh x is replicated or sharded. Over the batch or over whole groups
    of channels nothing is sent; over pixels statistics are. Other operands are redistributed to
    fit; plain tensors are taken to be the same on all ranks.
    """
    x = _supported(operands.x, num_groups)
    mesh, dims = x.device_mesh, [_sharded_dim(p) for p in x.placements]
    local = Operands._make(
        None if t is None else _local(name, t, x) for name, t in operands._asdict().items()
    )
    for i, dim in enumerate(dims):
        num_groups //= mesh.size(i) if dim == 1 else 1
    shards = [mesh.get_group(i) for i, dim in enumerate(dims) if dim > 1 and mesh.size(i) > 1]
    constants = num_groups, eps, activation
    if shards:
        y = dispatch.sharded_group_norm(local, *constants, shards)
    else:
        y = dispatch.group_norm(local, *constants)
    return DTensor.from_local(
        y, mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def _sharded_dim(placement: Placement) -> int:
    """Return the tensor dimension that a placement shards, or -1."""
    return placement.dim if isinstance(placement, Shard) else -1


def _supported(x: Any, num_groups: int) -> Any:
    """Return x, with placements that cannot be kept made replicated."""
    ways = 1
    placements: list[Placement] = []
    for i, placement in enumerate(x.placements):
        keep = isinstance(placement, Replicate | Shard)
        if _sharded_dim(placement) == 1:
            ways *= x.device_mesh.size(i)
            keep = keep and num_groups % ways == 0
        if not keep and not placement.is_partial():
            dispatch.warn_once(
                f"group_norm gathers a DTensor of {x.shape[1]} channels in {num_groups} groups: "
                f"{placement} does not keep groups whole. Shard it over another dimension, or over "
                "a number of ranks that divides the number of groups."
            )
        placements.append(placement if keep else Replicate())
    return x if tuple(placements) == tuple(x.placements) else x.redistribute(placements=placements)


def _local(name: str, t: Tensor, x: DTensor) -> Tensor:
    """Return this rank's part of an operand, placed to fit x."""
    mesh = x.device_mesh
    if not isinstance(t, DTensor):
        same = [Replicate()] * mesh.ndim
        t = DTensor.from_local(t, mesh, same, run_check=False)
    placements, of_gradient = _placements(name, t, x)
    if tuple(placements) != tuple(t.placements):
        t = t.redistribute(placements=placements)
    local = t.to_local(grad_placements=of_gradient)
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def _placements(
    name: str, t: Tensor, x: DTensor
) -> tuple[Sequence[Placement], Sequence[Placement]]:
    """Return the placements of an operand and of its gradient, to fit x."""
    if name in ("x", "residual"):
        return x.placements, x.placements
    rows = t.shape[0] if t.ndim > 1 else 1
    ours: list[Placement] = []
    gradients: list[Placement] = []
    for placement in x.placements:
        dim = _sharded_dim(placement)
        if dim == 1:
            ours.append(Shard(t.ndim - 1))
        elif dim == 0 and rows > 1:
            ours.append(Shard(0))
        else:
            ours.append(Replicate())
        # a gradient that ranks have parts of; those of pixels are summed up already
        gradients.append(Partial() if dim == 0 and rows == 1 else ours[-1])
    return ours, gradients
