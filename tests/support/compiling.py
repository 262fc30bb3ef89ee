"""Describe the launches of any problem, as planned for a GPU that need not be present."""

from typing import Any

import torch

from triton_gn.ops import launches
from triton_gn.plan import TARGETS, Config, Problem, plan
from triton_gn.reference import Operands


def launches_of(
    direction: str,
    shape: tuple[int, ...],
    num_groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    param_dtype: torch.dtype | None = None,
    affine: tuple[bool, bool] = (True, True),
    target: str = "sm_90",
    activation: str = "none",
    fused: tuple[str, ...] = (),
    **override: Any,
) -> list[launches.Launch]:
    """Return the launches of a problem as planned for a GPU of the target, without memory.

    ``fused`` names those of scale, shift, pre_add and residual that are present, per sample.
    """
    x = torch.empty(shape, dtype=dtype, device="meta")
    if channels_last:
        x = torch.empty_like(x.movedim(1, -1).contiguous()).movedim(-1, 1)
    n, channels = shape[:2]
    param_dtype = param_dtype or dtype
    weight, bias = (
        torch.empty(channels, dtype=param_dtype, device="meta") if present else None
        for present in affine
    )
    per_sample = {
        name: torch.empty(n, channels, dtype=param_dtype, device="meta")
        for name in fused
        if name != "residual"
    }
    residual = torch.empty_like(x) if "residual" in fused else None
    operands = Operands(x, weight, bias, **per_sample, residual=residual)
    if direction == "backward" and activation == "none":
        operands = operands._replace(residual=None)
    problem, config = _plan(direction, operands, num_groups, activation, target, **override)
    stats = launches.statistics(x, n, num_groups, 3)
    if direction == "forward":
        y = torch.empty_like(x)
        return launches.forward_launches(problem, config, operands, y, stats, 1e-5)
    grads = {name: torch.empty_like(t) for name, t in operands._asdict().items() if t is not None}
    dy = torch.empty_like(x)
    return launches.backward_launches(problem, config, dy, operands, stats, grads)


def _plan(
    direction: str,
    operands: Operands,
    num_groups: int,
    activation: str,
    target: str,
    **override: Any,
) -> tuple[Problem, Config]:
    problem = launches.problem_of(direction, operands, num_groups, activation)
    return problem, plan(problem, TARGETS[target], override=tuple(sorted(override.items())))


def statistics_launches(
    x: torch.Tensor, num_groups: int, activation: str, target: str
) -> list[launches.Launch]:
    """Return the launches around precomputed statistics, forward and backward, all gradients.

    They are those of group_norm_stats, of group_norm_apply, and of a sharded group_norm between its
    collectives.
    """
    n, channels = x.shape[:2]
    weight, pre_add = x.new_empty(channels), x.new_empty(n, channels)
    measured, applied = Operands(x, pre_add=pre_add), Operands(x, weight, pre_add=pre_add)
    stats = launches.statistics(x, n, num_groups, 3)
    shard_moments, sums = (
        launches.statistics(x, n, num_groups, *sizes) for sizes in ((8, 4), (1, 2))
    )
    grads = {name: torch.empty_like(t) for name, t in applied._asdict().items() if t is not None}
    dy = y = torch.empty_like(x)

    def planned(direction: str, operands: Operands, activation: str) -> tuple[Problem, Config]:
        return _plan(direction, operands, num_groups, activation, target, strategy="split")

    moments = launches.statistics(x, 4, n, num_groups)
    forward = planned("forward", measured, "none")
    described = launches.forward_launches(*forward, measured, None, None, 0.0, moments)
    forward = planned("forward", applied, activation)
    described += launches.forward_launches(*forward, applied, y, stats, 1e-5, shard_moments)
    problem, config = planned("backward", applied, activation)
    parts = launches.statistics(x, n, num_groups, config.num_partials, 2)
    described += launches.backward_launches(
        problem, config, dy, applied, stats, grads, parts, half="reduce"
    )
    wanted = {name: grads[name] for name in ("x", "pre_add")}
    for incoming, operands, act in ((dy, applied, activation), (None, measured, "none")):
        backward = planned("backward", operands, act)
        described += launches.backward_launches(
            *backward, incoming, operands, stats, wanted, sums, half="apply"
        )
    return described
