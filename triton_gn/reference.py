"""The formulas of docs/math.md in plain PyTorch operations.

They are the oracle of the tests. Each line is differentiable, so they are the double backward of
the kernels too. The compute dtype is float64 for float64 inputs and float32 for all others.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_gn import activations


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return PyTorch's own function for the name of an activation.

    Raises:
        KeyError: no activation has this name.
    """
    function = _FUNCTIONS.get(name)
    if function is not None:
        return function
    found = activations.lookup(name)
    if found is None:
        raise KeyError(name)
    return _torch_function(*found)


def _torch_function(
    row: activations.Activation, arguments: Mapping[str, Any]
) -> Callable[[Tensor], Tensor]:
    if row.function is None:
        return lambda z: z
    function = getattr(F, row.function)
    return partial(function, **arguments) if arguments else function


_FUNCTIONS = {name: _torch_function(row, row.arguments) for name, row in activations.TABLE.items()}


class Operands(NamedTuple):
    """All tensors of a call. Signatures and tuples of gradients have the same order.

    x is (N, C, *) and the residual has x's shape. The others hold a value per channel: (C,) or
    (1, C), shared by all samples, or (N, C).
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    pre_add: Tensor | None = None
    residual: Tensor | None = None


class Moments(NamedTuple):
    """Moments of each group, (N, G): count is int64, the others have the compute dtype."""

    count: Tensor  # type: ignore[assignment]  # replaces a method of tuples
    mean: Tensor
    mean_lo: Tensor
    m2: Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic on x."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Convert (C,), (1, C) or (N, C) to the compute dtype, in a shape that broadcasts to x."""
    rows = values.shape[0] if values.ndim > 1 else 1
    return values.to(compute_dtype(x)).reshape(rows, values.shape[-1], *[1] * (x.ndim - 2))


def per_group(values: Tensor, x: Tensor) -> Tensor:
    """Convert (N, G) to the compute dtype, in a shape that broadcasts to x."""
    return per_channel(values.repeat_interleave(x.shape[1] // values.shape[1], 1), x)


def normalise(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """Compute x_hat, which has x's shape and the compute dtype."""
    grouped = x.to(compute_dtype(x)).reshape(x.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    # the mean of the deviations is the rounding error of the first mean
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * rstd).reshape(x.shape)


def prologue(x: Tensor, pre_add: Tensor | None) -> Tensor:
    """Return x + pre_add in the compute dtype, or x itself where there is no pre_add."""
    return x if pre_add is None else x.to(compute_dtype(x)) + per_channel(pre_add, x)


def epilogue(n: Tensor, operands: Operands, activation: str) -> Tensor:
    """Compute y from the affine's output n, which has the compute dtype."""
    if operands.scale is not None:
        n = n * (1 + per_channel(operands.scale, n))
    if operands.shift is not None:
        n = n + per_channel(operands.shift, n)
    if operands.residual is not None:
        n = n + operands.residual.to(n.dtype)
    return activation_function(activation)(n)


def affine(x_hat: Tensor, operands: Operands, activation: str) -> Tensor:
    """Compute y from x_hat."""
    n = x_hat
    if operands.weight is not None:
        n = n * per_channel(operands.weight, n)
    if operands.bias is not None:
        n = n + per_channel(operands.bias, n)
    return epilogue(n, operands, activation)


def group_norm(operands: Operands, num_groups: int, eps: float, activation: str) -> Tensor:
    """Compute y in the compute dtype."""
    x = prologue(operands.x, operands.pre_add)
    return affine(normalise(x, num_groups, eps), operands, activation)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Knuth's two-sum: (hi, lo) with hi + lo == a + b exactly. lo is detached."""
    hi = a + b
    rounded_b = hi - a
    return hi, ((a - (hi - rounded_b)) + (b - rounded_b)).detach()


def centred(x: Tensor, mean: Tensor, mean_lo: Tensor, pre_add: Tensor | None) -> Tensor:
    """Compute ``x + pre_add - mean - mean_lo`` in the compute dtype. The means are (N, G)."""
    group_channels = x.shape[1] // mean.shape[1]
    mean = mean.repeat_interleave(group_channels, 1)
    mean_lo = mean_lo.repeat_interleave(group_channels, 1)
    if pre_add is not None:
        mean, rounding = two_sum(mean, -pre_add.to(mean.dtype))
        mean_lo = mean_lo + rounding
    return (x.to(mean.dtype) - per_channel(mean, x)) - per_channel(mean_lo, x)


def normalise_by(operands: Operands, mean: Tensor, mean_lo: Tensor, rstd: Tensor) -> Tensor:
    """Compute x_hat from precomputed statistics (N, G)."""
    x = operands.x
    return centred(x, mean, mean_lo, operands.pre_add) * per_group(rstd, x)


def moments(x: Tensor, num_groups: int, pre_add: Tensor | None) -> Moments:
    """Compute the moments of x + pre_add. Groups without elements have zeros."""
    n, channels = x.shape[:2]
    pixels, group_channels = math.prod(x.shape[2:]), channels // num_groups

    def sum_channels(values: Tensor) -> Tensor:
        return values.reshape(n, num_groups, group_channels).sum(-1)

    def group_sums(values: Tensor) -> Tensor:
        return sum_channels(values.to(compute_dtype(x)).reshape(n, channels, pixels).sum(-1))

    count = pixels * group_channels
    divisor = count + (count == 0)  # no max(): torch.jit.trace can record this
    total = group_sums(x)
    if pre_add is not None:
        total = total + pixels * sum_channels(pre_add.to(total.dtype).expand(n, channels))
    mean = total / divisor
    # m2 is the same relative to any constant
    deviations = centred(x, mean.detach(), torch.zeros_like(mean), pre_add)
    deviation = group_sums(deviations)
    mean_lo = deviation / divisor
    m2 = group_sums(deviations.square()) - mean_lo * deviation
    counts = torch.full_like(mean, count, dtype=torch.int64)
    return Moments(counts, mean, mean_lo.detach(), m2.clamp(min=0))


def merge(count: Tensor, mean: Tensor, mean_lo: Tensor, m2: Tensor) -> Moments:
    """Merge the moments of parts, which lie along the last dimension. Empty parts are ignored."""
    # there are few numbers, so they take float64 wherever the device has it
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    n, present = count.to(wide), count > 0
    share = n / n.sum(-1, keepdim=True).clamp(min=1)
    first = present.to(torch.int8).argmax(-1, keepdim=True)
    # detached: the result is the same for any reference
    reference = mean.detach().gather(-1, first).to(wide)
    difference = torch.where(present, (mean.to(wide) - reference) + mean_lo.to(wide), 0)
    shift = (share * difference).sum(-1, keepdim=True)
    merged_m2 = torch.where(present, m2.to(wide) + n * (difference - shift).square(), 0).sum(-1)
    hi, lo = two_sum(reference.squeeze(-1), shift.squeeze(-1))
    merged_mean = hi.to(mean.dtype)
    merged_lo = ((hi - merged_mean.to(wide)) + lo).to(mean.dtype).detach()
    return Moments(count.sum(-1), merged_mean, merged_lo, merged_m2.clamp(min=0).to(m2.dtype))


def group_norm_apply(operands: Operands, stats: Moments, eps: float, activation: str) -> Tensor:
    """Compute y in the compute dtype, normalised by precomputed moments."""
    rstd = (stats.m2 / stats.count + eps).rsqrt()
    x_hat = normalise_by(operands, stats.mean, stats.mean_lo, rstd)
    return affine(x_hat, operands, activation)


def gradients(
    dy: Tensor,
    operands: Operands,
    num_groups: int,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Compute the gradients of the operands that ``needs`` marks, in the operands' dtypes.

    The gradients are differentiable.
    """

    def y_of(*tensors: Tensor | None) -> Tensor:
        return group_norm(Operands._make(tensors), num_groups, eps, activation)

    return pull_back(y_of, operands, needs, dy.to(compute_dtype(operands.x)))


def spread(values: Iterable[Tensor], needs: Iterable[bool]) -> list[Tensor | None]:
    """Return one value for each of ``needs``, in order, None where ``needs`` is false."""
    remaining = iter(values)
    return [next(remaining) if needed else None for needed in needs]


def pull_back(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    d_results: Any,
) -> list[Tensor]:
    """Compute the gradients of the inputs that ``needs`` marks from those of the results.

    The gradients are differentiable.
    """
    leaves = [t for t, needed in zip(inputs, needs, strict=True) if needed]

    def of_leaves(*values: Tensor) -> Any:
        remaining = iter(values)
        return function(*(next(remaining) if n else t for t, n in zip(inputs, needs, strict=True)))

    # torch.autograd.grad would also follow one input into another that was computed from it
    _, vector_jacobian_product, *_ = torch.func.vjp(of_leaves, *leaves)
    return list(vector_jacobian_product(d_results))
