"""GroupNorm and InstanceNorm as layers: they hold the parameters and call ``functional``."""

import contextlib
import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from triton_gn.checks import check_activation
from triton_gn.functional import group_norm
from triton_gn.reference import activation_function


class _FusedLayer(nn.Module):
    """Give a layer of PyTorch an activation, and torch.jit.script an error that names a remedy."""

    activation: str | None = None  # class attribute, for layers that were pickled without one

    def extra_repr(self) -> str:
        """Return the arguments of PyTorch's layer, and the activation if there is one."""
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise an error for torch.jit.script, whose own error names no remedy."""
        raise RuntimeError(
            "torch.jit.script: the modules must be TorchScript, which Triton kernels are not; got "
            f"a {type(self).__name__}. Call triton_gn.unconvert on a converted model first, or use "
            "torch.jit.trace, torch.compile or torch.export."
        )


class GroupNorm(_FusedLayer, nn.GroupNorm):
    """A torch.nn.GroupNorm that runs the fused kernels.

    It has the same constructor, parameters and state_dict: checkpoints and code move both ways.

    Args:
        num_groups: number of groups of channels.
        num_channels: C of the input.
        eps: added to the variance.
        affine: whether there are a weight and a bias, each (C,).
        device: device of the parameters.
        dtype: dtype of the parameters.
        activation: applied to the output in the same kernel; :func:`triton_gn.group_norm` lists
            the names.
        kwargs: further arguments of the installed PyTorch's layer, such as ``bias=False``.
    """

    _group_norm = staticmethod(group_norm)  # ShardedGroupNorm overrides it

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
        **kwargs: Any,
    ) -> None:
        check_activation(activation)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **kwargs)
        self.activation = activation

    def forward(
        self,
        input: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        pre_add: Tensor | None = None,
    ) -> Tensor:
        """Return y of input's shape (N, C, *), with C = num_channels.

        Operands and errors: :func:`triton_gn.group_norm`.
        """
        return self._group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            scale=scale,
            shift=shift,
            residual=residual,
            pre_add=pre_add,
        )


class _InstanceNorm(_FusedLayer, nn.modules.instancenorm._InstanceNorm):
    """An instance norm that runs the fused kernels where it has no running statistics."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_activation(activation)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.activation = activation

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        """Return y of (N, C, *): PyTorch's forward has checked the input and added N."""
        channels = input.shape[1]
        # one pixel: PyTorch's own error
        if self.track_running_stats or channels == 0 or math.prod(input.shape[2:]) == 1:
            y: Tensor = super()._apply_instance_norm(input)  # type: ignore[no-untyped-call]
            return y if self.activation is None else activation_function(self.activation)(y)
        with _without_autocast(input.device.type):
            return group_norm(
                input, channels, self.weight, self.bias, self.eps, activation=self.activation
            )


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off where it is on: it widens group_norm, but not instance_norm."""
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """A torch.nn.InstanceNorm1d that runs the fused kernels, for (N, C, L) or (C, L).

    Each channel of each sample is normalised alone: a group norm with C groups. It keeps the
    input's memory format. With ``track_running_stats`` it runs PyTorch's own instance_norm, then
    the activation. Constructor, parameters, state_dict and errors are those of PyTorch's layer. For
    a scale, a shift or a residual, call :func:`triton_gn.group_norm` with C groups.

    Args:
        num_features: C of the input.
        eps: added to the variance.
        momentum: for the running statistics.
        affine: whether there are a weight and a bias, each (C,).
        track_running_stats: whether to keep running statistics, and to normalise by them in
            evaluation.
        device: device of the parameters.
        dtype: dtype of the parameters.
        activation: applied to the output in the same kernel; :func:`triton_gn.group_norm` lists
            the names.
        kwargs: further arguments of the installed PyTorch's layer, such as ``bias=False``.
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """A torch.nn.InstanceNorm2d that runs the fused kernels, for (N, C, H, W) or (C, H, W).

    Arguments and behaviour: :class:`triton_gn.InstanceNorm1d`.
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """A torch.nn.InstanceNorm3d that runs the fused kernels, for (N, C, D, H, W) or (C, D, H, W).

    Arguments and behaviour: :class:`triton_gn.InstanceNorm1d`.
    """
