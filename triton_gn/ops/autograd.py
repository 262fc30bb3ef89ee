"""The kernels as a differentiable function."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_gn import reference
from triton_gn.ops import launch, layout
from triton_gn.ops.settings import Settings


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    y_dtype: torch.dtype,
    settings: Settings,
) -> Tensor:
    """y in y_dtype through the kernels, recorded only if a derivative can be asked for."""
    operands = (x, weight, bias)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    # the Function raises under these, where a bare launch would drop a tangent
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if recorded or transformed:
        y: Tensor = GroupNormFunction.apply(*operands, groups, eps, y_dtype, settings)
        return y
    y, _ = _forward(*operands, groups, eps, y_dtype, settings, with_stats=False)
    return y


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    y_dtype: torch.dtype,
    settings: Settings,
    with_stats: bool,
) -> tuple[Tensor, Tensor | None]:
    """y and, if asked for, stats (N, G, 3): mean, mean_lo, rstd."""
    x, channels_last = layout.native(x)
    y = layout.empty_like(x, y_dtype)
    stats = launch.statistics(x, x.shape[0], groups, 3) if with_stats else None
    problem, config = launch.plan_for("forward", x, groups, channels_last, settings)
    launch.run(
        launch.forward_launches(problem, config, x, _dense(weight), _dense(bias), y, stats, eps),
        x.device,
    )
    return y, stats


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


class GroupNormFunction(torch.autograd.Function):
    """Keeps the input, the weight and the float32 statistics; nothing the size of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        y_dtype: torch.dtype,
        settings: Settings,
    ) -> Tensor:
        y, stats = _forward(x, weight, bias, groups, eps, y_dtype, settings, with_stats=True)
        ctx.save_for_backward(x, weight, stats)
        ctx.groups, ctx.eps = groups, eps
        # backward runs in a thread of its own, with settings of its own
        ctx.settings = settings
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, stats = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # create_graph=True: what runs now must itself be differentiable
            grads = reference.group_norm_backward(dy, x, ctx.groups, weight, ctx.eps)
            return (
                grads[0].to(x.dtype) if needs_dx else None,
                grads[1].to(weight.dtype) if needs_dweight else None,
                grads[2].to(ctx.bias_dtype) if needs_dbias else None,
                None, None, None, None,
            )  # fmt: skip
        x, channels_last = layout.native(x)
        dx = layout.empty_like(x) if needs_dx else None
        dweight, dbias = (
            torch.empty(x.shape[1], dtype=dtype, device=x.device) if needed else None
            for needed, dtype in (
                (needs_dweight, weight.dtype if needs_dweight else None),
                (needs_dbias, ctx.bias_dtype),
            )
        )
        problem, config = launch.plan_for("backward", x, ctx.groups, channels_last, ctx.settings)
        launches = launch.backward_launches(
            problem, config, layout.like(dy, x), x, _dense(weight), stats, dx, dbias, dweight
        )
        launch.run(launches, x.device)
        return dx, dweight, dbias, None, None, None, None
