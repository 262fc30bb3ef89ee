"""Statistics without normalisation, and normalisation by precomputed statistics.

The two launches of split as differentiable functions of their own. A backward that must itself be
differentiable runs the formulas in plain PyTorch.
"""

import functools
from collections.abc import Iterable
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
    found = launches.statistics(x, 4, x.shape[0], call.groups)
    launcher.forward(operands, call, None, None, found)
    return found


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
                found = reference.moments(x, groups, pre_add)
                return found.mean, found.m2

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
        return *_spread(grads, needs), None


def _spread(found: Iterable[Tensor], needs: Iterable[bool]) -> list[Tensor | None]:
    """Return one gradient for each of ``needs``, None where it says no."""
    rest = iter(found)
    return [next(rest) if needed else None for needed in needs]


def apply(operands: Operands, given: Moments, call: Call) -> Tensor:
    """Return y of a non-empty x, normalised by precomputed moments."""
    call = call._replace(settings=split_settings(call.settings))
    if context.records((*operands, *given)):
        y_recorded: Tensor = _ApplyFunction.apply(*operands, *given, call)
        return y_recorded
    y, _ = autograd.forward(operands, call, with_stats=False, moments=_as_partial(given))
    return y


def _as_partial(given: Moments) -> Tensor:
    """Return moments as one partial of split, (N, G, 4, 1); NaN for groups without elements."""
    mean = given.mean.masked_fill(given.count == 0, torch.nan)
    # a part without elements would be passed over
    fields = given.count.clamp(min=1).to(mean.dtype), mean, given.mean_lo, given.m2
    return torch.stack(fields, -1)[..., None]


class _ApplyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, call = inputs
        operands, given = Operands(*tensors[:_TENSORS]), Moments(*tensors[_TENSORS:])
        y, stats = autograd.forward(operands, call, with_stats=True, moments=_as_partial(given))
        assert stats is not None
        autograd.keep(ctx, operands, stats, call, *given)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, stats, count, mean, mean_lo, m2 = ctx.saved_tensors
        operands, given = Operands(*kept), Moments(count, mean, mean_lo, m2)
        *of_operands, _, needs_mean, _, needs_m2, _ = ctx.needs_input_grad
        dresidual = autograd.gradient_of_sum(ctx, dy, of_operands)
        run = _differentiable_apply_backward if torch.is_grad_enabled() else _apply_backward
        needs = [*of_operands, needs_mean, needs_m2]
        found = run(dy, stats, operands, given, ctx.call, needs)
        *grads, d_mean, d_m2 = _spread(found, needs)
        if dresidual is not None:
            grads[-1] = dresidual
        return *grads, None, d_mean, None, d_m2, None


def _apply_backward(
    dy: Tensor, stats: Tensor, operands: Operands, given: Moments, call: Call, needs: list[bool]
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
    found = list(grads.values())
    if needs_mean:
        found.append(-rstd * dx_hat_sum)
    if needs_m2:
        found.append(-0.5 * rstd.square() / given.count * dx_hat_x_hat_sum)
    return found


def _differentiable_apply_backward(
    dy: Tensor, stats: Tensor, operands: Operands, given: Moments, call: Call, needs: list[bool]
) -> list[Tensor]:
    """Run ``_apply_backward`` by the formulas, so that autograd can differentiate it."""

    def formulas(*tensors: Tensor | None) -> Tensor:
        *values, mean, m2 = tensors
        assert mean is not None
        assert m2 is not None
        replaced = given._replace(mean=mean, m2=m2)
        return reference.group_norm_apply(
            Operands._make(values), replaced, call.eps, call.activation
        )

    inputs = (*operands, given.mean, given.m2)
    dy = dy.to(reference.compute_dtype(operands.x))
    return reference.pull_back(formulas, inputs, needs, dy)
