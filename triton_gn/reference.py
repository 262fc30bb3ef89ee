"""The formulas of docs/math.md in plain PyTorch operations: the oracle of the tests and, because
each line is differentiable, the double backward of the kernels.

float32 arithmetic for 16-bit inputs, otherwise the input's own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


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


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the arithmetic on x is done in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,), (1, C) or (N, C) in the compute dtype, made to broadcast against x."""
    rows = values.shape[0] if values.ndim > 1 else 1
    return values.to(compute_dtype(x)).reshape(rows, values.shape[-1], *[1] * (x.ndim - 2))


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


def group_norm(operands: Operands, num_groups: int, eps: float, activation: str) -> Tensor:
    """y in the compute dtype."""
    x = prologue(operands.x, operands.pre_add)
    n = normalise(x, num_groups, eps)
    if operands.weight is not None:
        n = n * per_channel(operands.weight, n)
    if operands.bias is not None:
        n = n + per_channel(operands.bias, n)
    return epilogue(n, operands, activation)


def gradients(
    dy: Tensor,
    operands: Operands,
    num_groups: int,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Of those operands that ``needs`` names, in their dtypes; differentiable themselves."""
    asked = [t for t, needed in zip(operands, needs, strict=True) if needed]

    def y_of(*values: Tensor) -> Tensor:
        rest = iter(values)
        replaced = (next(rest) if n else t for t, n in zip(operands, needs, strict=True))
        return group_norm(Operands._make(replaced), num_groups, eps, activation)

    # not autograd.grad on the operands themselves: one may depend on another
    y, vector_jacobian_product, *_ = torch.func.vjp(y_of, *asked)
    return list(vector_jacobian_product(dy.to(y.dtype)))
