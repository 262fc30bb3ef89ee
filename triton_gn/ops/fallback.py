"""PyTorch's own group_norm and elementwise operations, with its mistakes on the CPU repaired.

Tracers, compilers and transforms get PyTorch's operators alone. With at most an activation fused
and nothing to repair, the result is PyTorch's to the bit. Calls with more operands compute in
float32 and round once; for an activation alone that would take longer than PyTorch's operations.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import context, layout
from triton_gn.ops.call import Call
from triton_gn.reference import Operands, activation_function

# Largest |mean| / std of a group for which PyTorch's channels-last kernel is trusted: its variance,
# E[x^2] - E[x]^2, loses digits as the square of this ratio.
_FAR_FROM_ZERO = 16.0
# Variance of a group over eps below which PyTorch's contiguous kernel is not trusted: a constant x
# comes out as the rounding error of x / sqrt(eps) instead of 0.
_NEARLY_CONSTANT = 0.01
_IMAGE_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def group_norm(operands: Operands, call: Call, is_transformed: bool = False) -> Tensor:
    """Return y of x's shape and strides: PyTorch's group_norm, then elementwise operations."""
    x, weight, bias, scale, shift, pre_add, residual = operands
    run = _on_cpu if x.is_cpu and not is_transformed and x.numel() > 0 else _in_context
    if scale is None and shift is None and pre_add is None and residual is None:
        y = run(x, call, weight, bias)
        y = y if call.activation == "none" else activation_function(call.activation)(y)
        return y if y.dtype is call.y_dtype else y.to(call.y_dtype)
    prepared = reference.prologue(x, pre_add).to(reference.compute_dtype(x))
    n = run(prepared, call, weight, bias)
    y = reference.epilogue(n, operands, call.activation).to(call.y_dtype)
    return y if context.is_tracing() else layout.like(y, layout.native(x)[0])


def _in_context(x: Tensor, call: Call, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.group_norm for compilers, tracers, transforms and other devices.

    y may have a wider dtype than x.
    """
    # a trace would record the answer to this question for all sizes
    if not context.is_tracing() and x.numel() == 0:
        return _empty(x, weight, bias)
    x, weight, bias = _parameters(x, weight, bias)
    if context.is_tracing():
        return F.group_norm(x, call.groups, weight, bias, call.eps)
    # contiguous, as PyTorch's compiler and transforms know it: they know channels-last in part
    y = F.group_norm(x.contiguous(), call.groups, weight, bias, call.eps)
    return y if x.is_contiguous() else layout.like(y, layout.native(x)[0])


def _on_cpu(x: Tensor, call: Call, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return group_norm on the CPU in x's memory format; only dispatch modes may look on."""
    if weight is None or bias is None or not weight.dtype is x.dtype is bias.dtype:
        x, weight, bias = _parameters(x, weight, bias)
    if (x.is_contiguous() and x.stride(1) != 1) or _is_image(x):
        return _repaired(x, call, weight, bias)
    if not x.is_contiguous():
        x, _ = layout.native(x)
    image = x
    if x.is_contiguous():
        image = x.flatten(2) if x.ndim > 2 else x  # of rank 3 nothing is channels-last to PyTorch
    elif not _is_image(x):
        image = x.flatten(2).unsqueeze(2)  # of one row, which PyTorch knows to be channels-last
        if image.stride(0) * image.shape[0] != image.numel():
            image = x.contiguous()
    y = _repaired(image, call, weight, bias)
    return layout.like(y.reshape(x.shape), x)


def _is_image(x: Tensor) -> bool:
    """Return True if PyTorch knows x to be channels-last, whatever it makes of sizes of 1."""
    memory_format = _IMAGE_FORMATS.get(x.ndim)
    return (
        memory_format is not None
        and x.is_contiguous(memory_format=memory_format)
        and x.stride(0) * x.shape[0] == x.numel()
        and 1 not in x.shape[1:]
    )


def _repaired(x: Tensor, call: Call, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Run PyTorch's group_norm on the CPU, or the formulas if its result is not to be trusted."""
    n, channels = x.shape[:2]
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    arguments = x, weight, bias, n, channels, x.numel() // (n * channels), call.groups, call.eps
    # a NaN compares false: it says nothing of the other groups; a mode may have no values at all
    if x.is_contiguous():
        y, _, rstd = torch.native_group_norm(*arguments)
        is_right = (
            context.has_mode() or rstd.max().item() ** 2 * call.eps * (1 + _NEARLY_CONSTANT) < 1
        )
    else:
        records = context.records((x, weight, bias))
        run = _ChannelsLast.apply if records else torch.native_group_norm
        y, mean, rstd = run(*arguments)
        farthest = mean * rstd
        is_right = (
            context.has_mode()
            or torch.linalg.vector_norm(farthest, math.inf).item() < _FAR_FROM_ZERO
        )
    if is_right:
        return y
    exact = reference.group_norm(Operands(x, weight, bias), call.groups, call.eps, "none")
    return layout.like(exact.to(x.dtype), x)


class _ChannelsLast(torch.autograd.Function):
    """Autograd function of PyTorch's channels-last CPU kernels.

    PyTorch's own crashes if the parameters need gradients and x does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        weight, bias, *ctx.sizes, ctx.eps = arguments
        y, mean, rstd = torch.native_group_norm(x, *arguments)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # create_graph=True: what runs now must itself be differentiable
            arguments = Operands(x, weight, bias), ctx.sizes[-1], ctx.eps, "none"
            present = reference.gradients(dy, *arguments, (*needs, *[False] * 4))
            return *reference.spread(present, needs), *[None] * 5
        # hooks on saved tensors may have given them any strides
        x, dy = (t.contiguous(memory_format=_IMAGE_FORMATS[x.ndim]) for t in (x, dy))
        weight, mean, rstd = (t if t is None else t.contiguous() for t in (weight, mean, rstd))
        dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
            dy, x, mean, rstd, weight, *ctx.sizes, [True, *[weight is not None] * 2]
        )
        grads = [
            grad if needed else None
            for grad, needed in zip((dx, dweight, dbias), needs, strict=True)
        ]
        return *grads, *[None] * 5


def _parameters(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return x, weight and bias as PyTorch takes them together."""
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)  # PyTorch's backward raises without one
    dtypes = {parameter.dtype for parameter in (weight, bias) if parameter is not None}
    compute_dtype = reference.compute_dtype(x)
    on_cpu = x.device.type == "cpu"  # which mixes 16-bit x with float32 parameters
    if dtypes <= {x.dtype} or (on_cpu and dtypes == {compute_dtype}):
        return x, weight, bias
    weight = None if weight is None else weight.to(compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    return x if on_cpu else x.to(compute_dtype), weight, bias


def _empty(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return y of an empty x. The gradients of weight and bias are 0; PyTorch's may be NaN."""
    y = x.clone()
    for parameter in (weight, bias):
        if parameter is not None:
            y = y + reference.per_channel(parameter, x).to(x.dtype)
    return y
