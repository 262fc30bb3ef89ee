"""The kernels as PyTorch operators, for torch.compile, torch.export, tensor subclasses and modes.

Eager calls go past them, straight to ``autograd``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_gn.ops import autograd, launches, layout, settings
from triton_gn.ops.call import Call
from triton_gn.reference import Operands

_TENSORS = len(Operands._fields)


@torch.library.custom_op("triton_gn::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    pre_add: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    y_dtype: torch.dtype,
    settings_text: str,
) -> tuple[Tensor, Tensor]:
    """Return y and stats (N, G, 3)."""
    operands = Operands(x, weight, bias, scale, shift, pre_add, residual)
    call = Call(groups, eps, activation, y_dtype, settings.from_text(settings_text))
    y, stats = autograd.forward(operands, call, with_stats=True)
    assert stats is not None
    return y, stats


@group_norm.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    groups, y_dtype = rest[_TENSORS - 1], rest[-2]
    x, _ = layout.native(x)
    return layout.empty_like(x, y_dtype), launches.statistics(x, x.shape[0], groups, 3)


@torch.library.custom_op("triton_gn::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: Tensor,
    stats: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    pre_add: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    settings_text: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients that ``needs`` names."""
    operands = Operands(x, weight, bias, scale, shift, pre_add, residual)
    call = Call(groups, eps, activation, dy.dtype, settings.from_text(settings_text))
    return autograd.backward(dy, stats, operands, call, needs)


@group_norm_backward.register_fake
def _(dy: Tensor, stats: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    x, _ = layout.native(x)
    operands = Operands(x, *rest[: _TENSORS - 1])
    return list(autograd.empty_gradients(operands, rest[-1]).values())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    groups, eps, activation, y_dtype, settings_text = inputs[_TENSORS:]
    call = Call(groups, eps, activation, y_dtype, settings.from_text(settings_text))
    autograd.keep(ctx, Operands(*inputs[:_TENSORS]), output[1], call)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *autograd.gradients(ctx, dy, _run_backward), *[None] * 5


def _run_backward(
    dy: Tensor, stats: Tensor, operands: Operands, call: Call, needs: Sequence[bool]
) -> list[Tensor]:
    text = settings.to_text(call.settings)
    constants = (call.groups, call.eps, call.activation, text, list(needs))
    grads: list[Tensor] = group_norm_backward(dy, stats, *operands, *constants)
    return grads


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    dy, _, *operands = inputs[: 2 + _TENSORS]
    groups, eps, activation, settings_text, ctx.needs = inputs[2 + _TENSORS :]
    ctx.call = Call(groups, eps, activation, dy.dtype, settings.from_text(settings_text))
    ctx.save_for_backward(dy, *operands)


def _double_backward(ctx: Any, d_grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    dy, *operands = ctx.saved_tensors
    d_dy, *d_operands = autograd.double_backward(
        d_grads, dy, Operands(*operands), ctx.call, ctx.needs
    )
    return d_dy, None, *d_operands, *[None] * 5


group_norm.register_autograd(_backward, setup_context=_setup_context)
group_norm_backward.register_autograd(_double_backward, setup_context=_setup_backward_context)
