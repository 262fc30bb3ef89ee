"""The formulas of docs/math.md in plain PyTorch: the oracle of the tests and, because every line is
differentiable, the double backward of the kernels.

float32 arithmetic for 16-bit inputs, otherwise the input's own.
"""

import torch
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """(C,) to (1, C, 1, ...) of x's rank."""
    return parameter.to(_compute_dtype(x)).reshape(1, -1, *[1] * (x.ndim - 2))


def normalise(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x_hat of x's shape and rstd (N, G, 1), both in the compute dtype."""
    grouped = x.to(_compute_dtype(x)).reshape(x.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    # the mean of what is left over is the rounding error of the first mean
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * rstd).reshape(x.shape), rstd


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """y in the compute dtype; x (N, C, *), weight and bias (C,)."""
    y, _ = normalise(x, num_groups, eps)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y


def group_norm_backward(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, C, *), dweight (C,), dbias (C,) in the compute dtype."""
    x_hat, rstd = normalise(x, num_groups, eps)
    dz = dy.to(x_hat.dtype)
    over_pixels = [0, *range(2, x.ndim)]
    dweight = (dz * x_hat).sum(over_pixels)
    dbias = dz.sum(over_pixels)
    dx_hat = dz if weight is None else dz * _per_channel(weight, x)
    dx_hat = dx_hat.reshape(x.shape[0], num_groups, -1)
    x_hat = x_hat.reshape(dx_hat.shape)
    dx = dx_hat - dx_hat.mean(-1, keepdim=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)
    return (dx * rstd).reshape(x.shape), dweight, dbias
