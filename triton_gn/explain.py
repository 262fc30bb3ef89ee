"""Explain which plan a call takes, and why."""

from dataclasses import dataclass, replace

from torch import Tensor

from triton_gn.checks import check, checked_groups
from triton_gn.ops import dispatch, launches, layout, settings
from triton_gn.ops.device import gpu_of
from triton_gn.ops.settings import Settings
from triton_gn.plan import (
    Config,
    Device,
    Problem,
    best_per_strategy,
    is_always_resident,
    is_verified,
    plan,
    table,
)
from triton_gn.reference import Operands


@dataclass(frozen=True)
class Explanation:
    """The plan of a call and the reason for it; prints as text.

    ``path`` is "triton" or "torch". Without a GPU ``config`` is the plan for an H100.
    """

    path: str
    problem: Problem
    device: str
    config: Config
    reason: str

    def __str__(self) -> str:
        tile = self.config.tile
        fragments = _count(tile.channel_tiles * tile.pixel_tiles, "fragment")
        text = (
            f"{self.path} path, {self.problem.direction}: {self.reason}\n"
            f"{self.config.strategy} on {self.device}: "
            f"{_count(self.config.grid(self.problem), 'program')} of "
            f"{_count(self.config.num_warps, 'warp')}, "
            f"each {fragments} of {tile.rows} x {tile.cols}"
        )
        if self.config.strategy != "resident":
            text += f", {_count(self.config.splits, 'split')} a group"
        if not is_verified(self.config):
            text += "\nno GPU has proven plans of this kind yet"
        return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def explain(
    input: Tensor,
    num_groups: int,
    *,
    direction: str = "forward",
    activation: str | None = None,
    pre_add: bool = False,
    residual: bool = False,
    per_sample: bool = False,
) -> Explanation:
    """Say which plan ``group_norm(input, num_groups)`` takes under this thread's settings, and why.

    Args:
        input: (N, C, *), not empty; only its shape, strides, dtype and device matter.
        num_groups: as for group_norm.
        direction: "forward" or "backward".
        activation: as for group_norm.
        pre_add: whether the call has one.
        residual: whether the call has one.
        per_sample: whether scale, shift or pre_add differ by sample; it matters only if a sample is
            one pixel.

    Raises:
        TypeError, ValueError: as group_norm, and for an empty input or another direction.
    """
    num_groups = checked_groups(num_groups)
    check(Operands(input), num_groups, activation)
    if direction not in ("forward", "backward"):
        raise ValueError(f"explain: direction must be forward or backward; got {direction!r}.")
    if input.numel() == 0:
        raise ValueError(f"explain: an empty input runs no kernel; got shape {tuple(input.shape)}.")
    current = settings.current()
    x, _ = layout.native(input)
    operands = Operands(
        x,
        scale=x if per_sample else None,
        pre_add=x[:1] if pre_add else None,
        residual=x if residual else None,
    )
    problem = launches.problem_of(direction, operands, num_groups, activation or "none")
    device = gpu_of(x.device)
    config = plan(problem, device, current.batch_invariant, current.plan_override)
    path = "triton" if dispatch.uses_kernels(input, current.backend) else "torch"
    if path == "torch":
        reason = dispatch.why_not_kernels(input) or 'the backend is "torch"'
        reason += "; the kernels would run"
    else:
        reason = _reason(problem, device, config, current)
    return Explanation(path, problem, device.name, config, reason)


def _reason(problem: Problem, device: Device, config: Config, current: Settings) -> str:
    """Return where a plan comes from."""
    fixed = dict(current.plan_override)
    if fixed:
        return f"plan_override({', '.join(f'{name}={value!r}' for name, value in fixed.items())})"
    measured = replace(problem, n=1) if current.batch_invariant else problem
    if (match := table.lookup(measured, device)) is not None and match.config is not None:
        return f"measured {'' if match.exact else 'for a similar problem '}in {match.path}"
    size = f"groups of {problem.group_elements} elements"
    if config.strategy == "resident" and is_always_resident(problem):
        return f"{size} stay on chip"
    estimates = (
        f"{strategy} is estimated at {us:.1f} us"
        for strategy, us in best_per_strategy(problem, device).items()
    )
    return f"{size}; {', '.join(estimates)}"
