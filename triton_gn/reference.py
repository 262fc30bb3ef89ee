"""The formulas of docs/math.md in plain PyTorch operations: the oracle of the tests and, because
each line is differentiable, the double backward of the kernels.

float32 arithmetic for 16-bit inputs, otherwise the input's own.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_gn.activations import TABLE, Activation


def _torch_function(row: Activation) -> Callable[[Tensor], Tensor]:
    if row.function is None:
        return lambda z: z
    function = getattr(F, row.function)
    return partial(function, **row.arguments) if row.arguments else function


# PyTorch's own function of each activation
ACTIVATIONS = {name: _torch_function(row) for name, row in TABLE.items()}


class Operands(NamedTuple):
    """All tensors of a call, in the order of every signature and of every tuple of gradients.

    x (N, C, *), residual of x's shape. The others have a value per channel: (C,) or (1, C) shared
    by all samples, or (N, C).
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    pre_add: Tensor | None = None
    residual: Tensor | None = None


class Moments(NamedTuple):
    """Of groups, each (N, G): int64, then three of the compute dtype."""

    count: Tensor  # type: ignore[assignment]  # in place of a method of tuples
    mean: Tensor
    mean_lo: Tensor
    m2: Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the arithmetic on x is done in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,), (1, C) or (N, C) in the compute dtype, made to broadcast against x."""
    rows = values.shape[0] if values.ndim > 1 else 1
    return values.to(compute_dtype(x)).reshape(rows, values.shape[-1], *[1] * (x.ndim - 2))


def per_group(values: Tensor, x: Tensor) -> Tensor:
    """(N, G), made to broadcast against x."""
    return per_channel(values.repeat_interleave(x.shape[1] // values.shape[1], 1), x)


def normalise(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """x_hat of x's shape, in the compute dtype."""
    grouped = x.to(compute_dtype(x)).reshape(x.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    # the mean of what is left over is the rounding error of the first mean
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * rstd).reshape(x.shape)


def prologue(x: Tensor, pre_add: Tensor | None) -> Tensor:
    """What is normalised; in the compute dtype unless it is x itself."""
    return x if pre_add is None else x.to(compute_dtype(x)) + per_channel(pre_add, x)


def epilogue(n: Tensor, operands: Operands, activation: str) -> Tensor:
    """From the affine's output n to y; n in the compute dtype."""
    if operands.scale is not None:
        n = n * (1 + per_channel(operands.scale, n))
    if operands.shift is not None:
        n = n + per_channel(operands.shift, n)
    if operands.residual is not None:
        n = n + operands.residual.to(n.dtype)
    return ACTIVATIONS[activation](n)


def affine(x_hat: Tensor, operands: Operands, activation: str) -> Tensor:
    """From x_hat to y."""
    n = x_hat
    if operands.weight is not None:
        n = n * per_channel(operands.weight, n)
    if operands.bias is not None:
        n = n + per_channel(operands.bias, n)
    return epilogue(n, operands, activation)


def group_norm(operands: Operands, num_groups: int, eps: float, activation: str) -> Tensor:
    """y in the compute dtype."""
    x = prologue(operands.x, operands.pre_add)
    return affine(normalise(x, num_groups, eps), operands, activation)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a + b`` as a pair of which the second is a constant to derivatives (Knuth)."""
    hi = a + b
    rest = hi - a
    return hi, ((a - (hi - rest)) + (b - rest)).detach()


def centred(x: Tensor, mean: Tensor, mean_lo: Tensor, pre_add: Tensor | None) -> Tensor:
    """``x + pre_add - mean - mean_lo`` of x's shape in the compute dtype; the means (N, G)."""
    group_channels = x.shape[1] // mean.shape[1]
    mean = mean.repeat_interleave(group_channels, 1)
    mean_lo = mean_lo.repeat_interleave(group_channels, 1)
    if pre_add is not None:
        mean, rest = two_sum(mean, -pre_add.to(mean.dtype))
        mean_lo = mean_lo + rest
    return (x.to(mean.dtype) - per_channel(mean, x)) - per_channel(mean_lo, x)


def normalise_by(operands: Operands, mean: Tensor, mean_lo: Tensor, rstd: Tensor) -> Tensor:
    """x_hat of x's shape, in the compute dtype, by statistics (N, G) that are given."""
    x = operands.x
    return centred(x, mean, mean_lo, operands.pre_add) * per_group(rstd, x)


def moments(x: Tensor, num_groups: int, pre_add: Tensor | None) -> Moments:
    """Of x + pre_add; zeros of groups without elements."""
    n, channels = x.shape[:2]
    pixels, group_channels = math.prod(x.shape[2:]), channels // num_groups

    def over_channels(values: Tensor) -> Tensor:
        return values.reshape(n, num_groups, group_channels).sum(-1)

    def sums(values: Tensor) -> Tensor:
        return over_channels(values.to(compute_dtype(x)).reshape(n, channels, pixels).sum(-1))

    count = pixels * group_channels
    divisor = count + (count == 0)  # no max(): torch.jit.trace can record this
    total = sums(x)
    if pre_add is not None:
        total = total + pixels * over_channels(pre_add.to(total.dtype).expand(n, channels))
    mean = total / divisor
    # relative to a constant: m2 is the same for any
    deviations = centred(x, mean.detach(), torch.zeros_like(mean), pre_add)
    deviation = sums(deviations)
    mean_lo = deviation / divisor
    m2 = sums(deviations.square()) - mean_lo * deviation
    counts = torch.full_like(mean, count, dtype=torch.int64)
    return Moments(counts, mean, mean_lo.detach(), m2.clamp(min=0))


def merge(count: Tensor, mean: Tensor, mean_lo: Tensor, m2: Tensor) -> Moments:
    """Of all parts, which lie along the last dimension; those of count 0 do not matter."""
    # few numbers, so in float64, unless the device has none
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    n, there = count.to(wide), count > 0
    share = n / n.sum(-1, keepdim=True).clamp(min=1)
    first = there.to(torch.int8).argmax(-1, keepdim=True)
    # a constant to derivatives, as the result is the same for any
    reference = mean.detach().gather(-1, first).to(wide)
    difference = torch.where(there, (mean.to(wide) - reference) + mean_lo.to(wide), 0)
    step = (share * difference).sum(-1, keepdim=True)
    merged_m2 = torch.where(there, m2.to(wide) + n * (difference - step).square(), 0).sum(-1)
    hi, lo = two_sum(reference.squeeze(-1), step.squeeze(-1))
    merged_mean = hi.to(mean.dtype)
    merged_lo = ((hi - merged_mean.to(wide)) + lo).to(mean.dtype).detach()
    return Moments(count.sum(-1), merged_mean, merged_lo, merged_m2.clamp(min=0).to(m2.dtype))


def group_norm_apply(operands: Operands, given: Moments, eps: float, activation: str) -> Tensor:
    """y in the compute dtype, normalised by moments that are given."""
    rstd = (given.m2 / given.count + eps).rsqrt()
    x_hat = normalise_by(operands, given.mean, given.mean_lo, rstd)
    return affine(x_hat, operands, activation)


def gradients(
    dy: Tensor,
    operands: Operands,
    num_groups: int,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Of those operands that ``needs`` names, in their dtypes; differentiable themselves."""

    def y_of(*tensors: Tensor | None) -> Tensor:
        return group_norm(Operands._make(tensors), num_groups, eps, activation)

    return pull_back(y_of, operands, needs, dy.to(compute_dtype(operands.x)))


def pull_back(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    d_results: Any,
) -> list[Tensor]:
    """The gradients of those inputs that ``needs`` names, from those of the function's results;
    differentiable themselves."""
    asked = [t for t, needed in zip(inputs, needs, strict=True) if needed]

    def of_asked(*values: Tensor) -> Any:
        rest = iter(values)
        return function(*(next(rest) if n else t for t, n in zip(inputs, needs, strict=True)))

    # not autograd.grad on the inputs themselves: one may depend on another
    _, vector_jacobian_product, *_ = torch.func.vjp(of_asked, *asked)
    return list(vector_jacobian_product(d_results))
