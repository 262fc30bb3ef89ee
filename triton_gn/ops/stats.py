"""Statistics without normalisation, and normalisation by precomputed statistics.

The two launches of split as differentiable functions of their own. A backward that must itself be
differentiable runs the formulas in plain PyTorch.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triton_gn import reference
from triton_gn.ops import autograd, context, launcher, launches
from triton_gn.ops.call import Call
from triton_gn.ops.settings import Settings
from triton_gn.reference import Moments, Operands

_TENSORS = len(Operands._fields)


@functools.cache
def split_settings(settings: Settings) -> Settings:
    """Return the settings with plans restricted to split."""
    fixed = dict(settings.plan_override)
    if fixed.pop("strategy", "split") != "split":
        fixed = {}  # the other fields are those of the other strategy
    return replace(settings, plan_override=(("strategy", "split"), *fixed.items()))


def moments(x: Tensor, pre_add: Tensor | None, groups: int, settings: Settings) -> Moments:
    """Return the moments of each group of a non-empty x + pre_add."""
    call = Call(groups, 0.0, "none", x.dtype, split_settings(settings))
    mean, mean_lo, m2 = _MomentsFunction.apply(x, pre_add, call)
    count = torch.full_like(mean, x[0].numel() // groups, dtype=torch.int64)
    return Moments(count, mean, mean_lo, m2)


def own_moments(operands: Operands, call: Call) -> Tensor:
    """Return count, mean, mean_lo and m2 of x + pre_add: (4, N, G)."""
    operands = autograd.native(operands)
    x = operands.x
    moments = launches.statistics(x, 4, x.shape[0], call.groups)
    launcher.forward(operands, call, None, None, moments)
    return moments


class _MomentsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pre_add: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        _, mean, mean_lo, m2 = own_moments(Operands(x, pre_add=pre_add), call).unbind()
        # the mean is one number: all of its gradient comes by its high part
        ctx.mark_non_differentiable(mean_lo)
        ctx.save_for_backward(x, pre_add, mean, mean_lo)
        ctx.call = call
        return mean, mean_lo, m2

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, _: Tensor, d_m2: Tensor) -> tuple[Tensor | None, ...]:
        x, pre_add, mean, mean_lo = ctx.saved_tensors
        needs, groups = ctx.needs_input_grad[:2], ctx.call.groups
        if torch.is_grad_enabled():

            def formulas(x: Tensor, pre_add: Tensor | None) -> tuple[Tensor, Tensor]:
                moments = reference.moments(x, groups, pre_add)
                return moments.mean, moments.m2

            grads = reference.pull_back(formulas, (x, pre_add), needs, (d_mean, d_m2))
        else:
            operands = autograd.native(Operands(x, pre_add=pre_add))
            wanted = dict(zip(("x", "pre_add"), needs, strict=True))
            named = autograd.empty_gradients(
                operands, [wanted.get(name, False) for name in Operands._fields]
            )
            stats = torch.stack([mean, mean_lo, torch.ones_like(mean)], -1)
            sums = torch.stack([-d_mean, d_m2 * (-2 * (x[0].numel() // groups))], -1)
            launcher.backward(operands, ctx.call, None, stats, named, "apply", sums)
            grads = list(named.values())
        return *reference.spread(grads, needs), None


def apply(operands: Operands, moments: Moments, call: Call) -> Tensor:
    """Return y of a non-empty x, normalised by precomputed moments."""
    call = call._replace(settings=split_settings(call.settings))
    if context.records((*operands, *moments)):
        y_recorded: Tensor = _ApplyFunction.apply(*operands, *moments, call)
        return y_recorded
    y, _ = autograd.forward(operands, call, with_stats=False, moments=_as_partial(moments))
    return y


def _as_partial(moments: Moments) -> Tensor:
    """Return moments as one partial of split, (N, G, 4, 1); NaN for groups without elements."""
    mean = moments.mean.masked_fill(moments.count == 0, torch.nan)
    # a part without elements would be passed over
    fields = moments.count.clamp(min=1).to(mean.dtype), mean, moments.mean_lo, moments.m2
    return torch.stack(fields, -1)[..., None]


class _ApplyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, call = inputs
        operands, moments = Operands(*tensors[:_TENSORS]), Moments(*tensors[_TENSORS:])
        y, stats = autograd.forward(operands, call, with_stats=True, moments=_as_partial(moments))
        assert stats is not None
        autograd.keep(ctx, operands, stats, call, *moments)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, stats, count, mean, mean_lo, m2 = ctx.saved_tensors
        operands, moments = Operands(*kept), Moments(count, mean, mean_lo, m2)
        *of_operands, _, needs_mean, _, needs_m2, _ = ctx.needs_input_grad
        dresidual = autograd.gradient_of_sum(ctx, dy, of_operands)
        run = _differentiable_apply_backward if torch.is_grad_enabled() else _apply_backward
        needs = [*of_operands, needs_mean, needs_m2]
        present = run(dy, stats, operands, moments, ctx.call, needs)
        *grads, d_mean, d_m2 = reference.spread(present, needs)
        if dresidual is not None:
            grads[-1] = dresidual
        return *grads, None, d_mean, None, d_m2, None


def _apply_backward(
    dy: Tensor, stats: Tensor, operands: Operands, moments: Moments, call: Call, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of the operands, mean and m2 that ``needs`` names."""
    *of_operands, needs_mean, needs_m2 = needs
    operands = autograd.native(operands)
    grads = autograd.empty_gradients(operands, of_operands)
    dy = autograd.beside(dy, operands.x)
    parts = launcher.backward(operands, call, dy, stats, grads, "reduce")
    assert parts is not None
    dx_hat_sum, dx_hat_x_hat_sum = parts.sum(-1).unbind(-1)
    rstd = stats[..., 2]
    present = list(grads.values())
    if needs_mean:
        present.append(-rstd * dx_hat_sum)
    if needs_m2:
        present.append(-0.5 * rstd.square() / moments.count * dx_hat_x_hat_sum)
    return present


def _differentiable_apply_backward(
    dy: Tensor, stats: Tensor, operands: Operands, moments: Moments, call: Call, needs: list[bool]
) -> list[Tensor]:
    """Run ``_apply_backward`` by the formulas, so that autograd can differentiate it."""

    def formulas(*tensors: Tensor | None) -> Tensor:
        *values, mean, m2 = tensors
        assert mean is not None
        assert m2 is not None
        replaced = moments._replace(mean=mean, m2=m2)
        return reference.group_norm_apply(
            Operands._make(values), replaced, call.eps, call.activation
        )

    inputs = (*operands, moments.mean, moments.m2)
    dy = dy.to(reference.compute_dtype(operands.x))
    return reference.pull_back(formulas, inputs, needs, dy)
