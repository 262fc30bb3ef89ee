"""PyTorch's own group_norm, with what it gets wrong repaired.

Never slower and never less exact than what it replaces, but for the price of the repairs.
"""

from typing import Any

import torch
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import context, layout
from triton_gn.reference import Operands

# PyTorch's channels-last CPU kernel takes E[x^2] - E[x]^2: the square of |mean| / std says how many
# roundings the variance loses. At 2 that is 3e-7 in float32; at 1e5 nothing is left.
_FAR_FROM_ZERO = 2.0


def group_norm(
    operands: Operands, num_groups: int, eps: float, activation: str, y_dtype: torch.dtype
) -> Tensor:
    """y of x's shape and strides: PyTorch's group_norm, then elementwise operations."""
    x, weight, bias, *fused = operands
    if activation == "none" and all(t is None for t in fused):
        return _affine(x, num_groups, weight, bias, eps).to(y_dtype)
    x, _ = layout.native(x)
    prepared = reference.prologue(x, operands.pre_add).to(reference.compute_dtype(x))
    n = _affine(prepared, num_groups, weight, bias, eps)
    y = reference.epilogue(n, operands, activation)
    return layout.like(y.to(y_dtype), x)


def _affine(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """As torch.nn.functional.group_norm, without its checks; perhaps in a wider dtype than x."""
    if x.numel() == 0:
        return _empty(x, weight, bias)
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)  # PyTorch's backward raises without one
    compute_dtype = _parameter_dtype(x, weight, bias)
    if compute_dtype is not None:
        weight = None if weight is None else weight.to(compute_dtype)
        bias = None if bias is None else bias.to(compute_dtype)
        if x.device.type != "cpu":  # only the CPU mixes dtypes
            x = x.to(compute_dtype)
    if x.is_contiguous():
        return torch.group_norm(x, num_groups, weight, bias, eps)
    x, channels_last = layout.native(x)
    if x.device.type != "cpu":  # PyTorch's kernels there give contiguous results
        return layout.like(torch.group_norm(x, num_groups, weight, bias, eps), x)
    if not channels_last:
        return torch.group_norm(x, num_groups, weight, bias, eps)
    # no autograd.Function and no look at a value where someone else traces or transforms
    if (
        context.is_compiling()
        or context.is_tracing()
        or context.in_functorch()
        or context.in_forward_mode()
        or context.has_subclass((x, weight, bias))
    ):
        y = reference.group_norm(Operands(x, weight, bias), num_groups, eps, "none")
        return layout.like(y.to(x.dtype), x)
    y_channels_last: Tensor = _ChannelsLast.apply(x, num_groups, weight, bias, eps)
    return y_channels_last


def _parameter_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype | None:
    """What the parameters must be cast to; None if PyTorch takes them as they are."""
    dtypes = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    if dtypes <= {x.dtype}:
        return None
    compute_dtype = reference.compute_dtype(x)
    if x.device.type == "cpu" and dtypes == {compute_dtype}:
        return None
    return compute_dtype


def _empty(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y of an empty x; the gradients of weight and bias are then 0, where PyTorch's may be NaN."""
    y = x.clone()
    for parameter in (weight, bias):
        if parameter is not None:
            y = y + reference.per_channel(parameter, x).to(x.dtype)
    return y


class _ChannelsLast(torch.autograd.Function):
    """PyTorch's channels-last CPU kernels for any rank and order of the pixels.

    Repaired: the variance of a mean far from 0; the backward, which crashes where no gradient of x
    is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        n, channels = x.shape[:2]
        ctx.sizes = (n, channels, x.numel() // (n * channels), num_groups)
        ctx.eps = eps
        image = _image(x)
        y, mean, rstd = torch.ops.aten.native_group_norm(image, weight, bias, *ctx.sizes, eps)
        # a NaN compares false, so it hides nothing of the other groups
        ctx.shift = mean if ((mean * rstd).abs() > _FAR_FROM_ZERO).any() else None
        if ctx.shift is not None:
            image = _shifted(image, ctx.shift)
            y, mean, rstd = torch.ops.aten.native_group_norm(
                image, *_cast(image.dtype, weight, bias), *ctx.sizes, eps
            )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        result: Tensor = y.to(x.dtype).as_strided(x.shape, x.stride())
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        num_groups = ctx.sizes[-1]
        needs_dx, _, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # create_graph=True: what runs now must itself be differentiable
            needs = (needs_dx, needs_dweight, needs_dbias, *[False] * 4)
            operands = Operands(x, weight, bias)
            grads = iter(reference.gradients(dy, operands, num_groups, ctx.eps, "none", needs))
            dx, dweight, dbias = (next(grads) if needed else None for needed in needs[:3])
            return dx, None, dweight, dbias, None
        image, dy_image = _image(x), _image(layout.like(dy, x))
        if ctx.shift is not None:
            image = _shifted(image, ctx.shift)
            dy_image = dy_image.to(image.dtype)
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            dy_image, image, mean, rstd, *_cast(mean.dtype, weight), *ctx.sizes,
            [True, weight is not None, weight is not None],
        )  # fmt: skip
        return (
            dx.as_strided(x.shape, x.stride()).to(x.dtype) if needs_dx else None,
            None,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(bias.dtype) if needs_dbias else None,
            None,
        )


def _image(x: Tensor) -> Tensor:
    """The dense channels-last x as (N, C, 1, pixels), which PyTorch knows to be channels-last."""
    n, channels = x.shape[:2]
    pixels = x.numel() // (n * channels)
    row = channels * pixels
    return x.as_strided((n, channels, 1, pixels), (row, 1, row, channels))


def _shifted(image: Tensor, shift: Tensor) -> Tensor:
    """The image less a constant (N, G) of each group, which changes neither y nor any gradient."""
    dtype = reference.compute_dtype(image)
    per_channel = shift.repeat_interleave(image.shape[1] // shift.shape[1], 1)
    return image.to(dtype) - per_channel.to(dtype)[:, :, None, None]


def _cast(dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if parameter is None else parameter.to(dtype) for parameter in parameters]
