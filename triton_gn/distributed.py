"""GroupNorm of spatially sharded inputs, by torch.distributed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from triton_gn import checks, functional
from triton_gn.module import GroupNorm
from triton_gn.ops import context, dispatch
from triton_gn.reference import Operands

ProcessGroup = dist.ProcessGroup | DeviceMesh | None


def sharded_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pre_add: Tensor | None = None,
    process_group: ProcessGroup = None,
) -> Tensor:
    """Compute :func:`triton_gn.group_norm` of an input that is spatially sharded among processes.

    The shards have the same N and C. They split the pixels along any spatial dimension, evenly or
    not; some may be empty. Per call: one all_gather of 16 N G bytes forward; one all_reduce of
    8 N G bytes plus the summed gradients (4 bytes per value) backward, and a second all_reduce for
    pre_add's gradient if it is needed. float64 doubles these sizes.

    As for any collective, all processes of the group make the same calls in the same order, forward
    and backward, and differentiate the same tensors, even if their shard is empty. The gradients of
    weight, bias, scale, shift and pre_add are summed over the processes and equal on each. There is
    no double backward (it raises). torch.compile breaks its graph here.

    Args:
        input: (N, C, *), this process's shard.
        num_groups, weight, bias, eps, activation, scale, shift, pre_add: as for ``group_norm``, the
            same on all processes.
        residual: this process's shard.
        process_group: the processes that share the input. None is the default group; a DeviceMesh
            stands for all its dimensions.

    Returns:
        This process's shard of y.

    Raises:
        TypeError, ValueError: as ``group_norm``.
        RuntimeError: torch.distributed is not initialised; another process has died, or has
            exceeded the group's timeout.
    """
    operands = Operands(input, weight, bias, scale, shift, pre_add, residual)
    num_groups, eps = checks.checked_groups(num_groups), checks.checked_eps(eps)
    checks.check(operands, num_groups, activation, is_part=True)
    if context.is_dtensor(input):
        raise TypeError(
            "sharded_group_norm: input must be this process's part, a plain tensor; got a DTensor, "
            "whose placements say how it is sharded. Give it to group_norm or triton_gn.GroupNorm."
        )
    shards = [group for group in _groups(process_group) if dist.get_world_size(group) > 1]
    constants = num_groups, eps, activation or "none"
    if not shards:
        checks.check(operands, num_groups, activation)
        return dispatch.group_norm(functional.in_rows(operands), *constants)
    return dispatch.sharded_group_norm(functional.in_rows(operands), *constants, shards)


def _groups(process_group: ProcessGroup) -> Sequence[dist.ProcessGroup]:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "ShardedGroupNorm: torch.distributed must be initialised before the layer is called; "
            "it is not. Call torch.distributed.init_process_group, or take a triton_gn.GroupNorm."
        )
    if process_group is None:
        return [dist.distributed_c10d._get_default_group()]
    if isinstance(process_group, DeviceMesh):
        return process_group.get_all_groups()
    return [process_group]


class ShardedGroupNorm(GroupNorm):
    """A triton_gn.GroupNorm of spatially sharded inputs.

    It has the same parameters and state_dict. Each process calls it with its shard;
    :func:`sharded_group_norm` documents the traffic, the rules for the processes and the errors.
    Parameter gradients are summed over ``process_group`` and over no other group.

    Args:
        num_groups: number of groups of channels.
        num_channels: C of the input.
        eps: added to the variance.
        affine: whether there are a weight and a bias, each (C,).
        device: device of the parameters.
        dtype: dtype of the parameters.
        activation: as for :class:`triton_gn.GroupNorm`.
        process_group: the processes that share each input. None is the default group; a DeviceMesh,
            such as ``mesh["space"]``, stands for all its dimensions.
        kwargs: further arguments of the installed PyTorch's layer, such as ``bias=False``.
    """

    process_group: ProcessGroup = None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        process_group: ProcessGroup = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_groups, num_channels, eps, affine, device, dtype, activation=activation, **kwargs
        )
        self.process_group = process_group

    def _group_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        return sharded_group_norm(*args, **kwargs, process_group=self.process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedGroupNorm":
        """Return a copy that shares the process group, which PyTorch cannot copy."""
        copied = self.__class__.__new__(self.__class__)
        memo |= {id(self): copied, id(self.process_group): self.process_group}
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
