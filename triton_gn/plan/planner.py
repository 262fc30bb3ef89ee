"""Plan a problem for a device: override, then measured table, then heuristic."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from . import table
from .candidates import (
    OWN_FIELDS,
    config_of,
    fields_of,
    group_counts,
    resident_configs,
    split_configs,
)
from .config import Config
from .cost_model import estimate, group_bytes, guessed_ctas, padding, second_passes
from .devices import Device
from .limits import excess_registers, fits, is_always_resident
from .problem import Problem

STRATEGIES = ("resident", "split")
# no GPU has proven these yet: only measured tables choose them
UNVERIFIED = ("pipelined",)
_ELEMENTS_PER_THREAD = 32
_FLOAT64_PER_THREAD = 8
_FEW_FRAGMENTS = 8  # up to 8, small fragments are better: their accumulators take fewer registers
_MAX_WARPS = 8  # 16 warps halve the registers of a thread: large tiles spill
_SPLIT_WARPS = 4
_SPLITS = (4, 8)  # programs per multiprocessor
_SPLIT_COLS = 128  # columns of a fragment: whole lines of memory, few partials
_PIPELINED_WARPS = 4
_MANY = 2**31  # programs: as many as there are iterations
_EQUAL = 1.05  # ratio of times that the cost model does not distinguish
# no GPU has checked the cost model: of times within this ratio, the config that reads less wins
_CLOSE = 1.15
_STAGE_SHARE = 0.125  # fraction of L2 for a stage, since several are in flight
_SEARCHED_WARPS = (1, 2, 4, 8, 16)
_SEARCHED_SPLITS = (4, 8, 16)  # programs per multiprocessor


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Problem,
    device: Device,
    batch_invariant: bool = False,
    override: tuple[tuple[str, Any], ...] = (),
) -> Config:
    """Return the plan for a problem.

    ``batch_invariant`` plans for a batch of one, whatever the batch. ``override`` fixes some of
    ``FIELDS``; the heuristic chooses the others, and tables are ignored.

    Raises:
        ValueError: no plan with these overrides can run.
    """
    if batch_invariant:
        problem = replace(problem, n=1)
    if not override:
        match = table.lookup(problem, device)
        if match is not None and match.config is not None:
            return match.config
    fixed = dict(override)
    strategies = (fixed.pop("strategy"),) if "strategy" in fixed else STRATEGIES
    for name, value in fixed.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"plan_override: {name} must be an int of at least 1; got {value!r}.")
    config = heuristic_plan(problem, device, strategies, fixed.pop("groups", None))
    return _overridden(problem, config, device, fixed) if fixed else config


def forget_plans() -> None:
    """Clear the caches of tables and plans, after a table has changed."""
    table.reload()
    plan.cache_clear()


def heuristic_plan(
    problem: Problem,
    device: Device,
    strategies: tuple[str, ...] = STRATEGIES,
    groups: int | None = None,
) -> Config:
    """Return the fastest config by the cost model; of close ones, the one that reads less.

    ``groups`` fixes the number of whole groups of a block.

    Raises:
        ValueError: no config can run.
    """
    best = [
        config
        for strategy in strategies
        if (config := _best(strategy, problem, device, groups)) is not None
    ]
    if not best:
        raise ValueError(_no_plan(problem, strategies, groups))
    best = [config for config in best if _is_wide(problem, config)] or best
    if is_always_resident(problem):
        return best[0]
    times = {config: estimate(problem, config, device).us for config in best}
    close = [config for config in best if times[config] <= _CLOSE * min(times.values())]
    return min(close, key=lambda config: (second_passes(problem, config), times[config]))


def plan_unverified(problem: Problem, device: Device) -> Config:
    """Return the heuristic's config if all strategies were allowed."""
    return heuristic_plan(problem, device, STRATEGIES + UNVERIFIED)


def is_verified(config: Config) -> bool:
    """Return whether a GPU has proven the strategy, so that the heuristic may choose it."""
    return config.strategy in STRATEGIES


def _is_wide(problem: Problem, config: Config) -> bool:
    """Return whether accesses are as wide as those of any config."""
    return problem.access_bytes(config.tile.groups) == problem.vec * problem.itemsize


def best_per_strategy(problem: Problem, device: Device) -> dict[str, float]:
    """Return the predicted microseconds of the best config of each strategy that can run."""
    best = {strategy: _best(strategy, problem, device) for strategy in STRATEGIES}
    return {
        strategy: estimate(problem, config, device).us
        for strategy, config in best.items()
        if config is not None
    }


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Return all configs that a search may try, in the order of predicted time.

    The default config is among them.
    """
    configs = {heuristic_plan(problem, device): None}
    counts = group_counts(problem)
    for num_warps in _SEARCHED_WARPS:
        configs |= dict.fromkeys(resident_configs(problem, counts, num_warps, device.warp_size))
        for per_multiprocessor in _SEARCHED_SPLITS:
            programs = device.multiprocessors * per_multiprocessor
            configs |= dict.fromkeys(
                split_configs(problem, counts, num_warps, device.warp_size, programs)
            )
        configs |= dict.fromkeys(_pipelined_configs(problem, counts, num_warps, device))
    return sorted(
        (config for config in configs if fits(problem, config, device) is None),
        key=lambda config: estimate(problem, config, device).us,
    )


def _best(
    strategy: str, problem: Problem, device: Device, groups: int | None = None
) -> Config | None:
    """Return the fastest config of a strategy among those with the widest accesses.

    Of equally fast ones, return the simplest.
    """
    candidates = [
        config
        for config in _candidates(strategy, problem, device, groups)
        if fits(problem, config, device) is None
    ]
    if not candidates:
        return None
    widest = max(problem.access_bytes(config.tile.groups) for config in candidates)
    candidates = [
        config for config in candidates if problem.access_bytes(config.tile.groups) == widest
    ]
    excess = {config: excess_registers(problem, config, device) for config in candidates}
    least = min(excess.values())
    times = {
        config: estimate(problem, config, device).us
        for config in candidates
        if excess[config] == least
    }
    limit = _EQUAL * min(times.values())
    equals = [config for config in times if times[config] <= limit]
    simplicity = _resident_simplicity if strategy == "resident" else _split_simplicity
    return min(equals, key=lambda config: (*simplicity(problem, config), times[config]))


def _resident_simplicity(problem: Problem, config: Config) -> tuple[int, ...]:
    """Return costs to minimise, in this order.

    Each part reads weight and bias and writes partial gradients. Each channel tile is reduced by
    itself. The rest is the size of the code.
    """
    tile = config.tile
    fragments = max(_FEW_FRAGMENTS, tile.channel_tiles * tile.pixel_tiles)
    return (
        config.parts(problem), tile.channel_tiles, fragments, tile.elements, tile.rows * tile.cols,
        config.num_warps,
    )  # fmt: skip


def _split_simplicity(problem: Problem, config: Config) -> tuple[float, ...]:
    """Prefer one tile for all sizes of an image, so that they share kernels.

    Its fragments are ``_SPLIT_COLS`` wide, unless they would extend beyond the group.
    """
    tile = config.tile
    off = abs(math.log2(tile.cols / _SPLIT_COLS)) + 2 * math.log2(padding(problem, config))
    return off, tile.cols, tile.rows, tile.pixel_tiles


def _candidates(
    strategy: str, problem: Problem, device: Device, groups: int | None
) -> Iterator[Config]:
    counts = group_counts(problem) if groups is None else [groups]
    if strategy == "resident":
        yield from _resident_configs(problem, counts, device)
    elif strategy == "split":
        for per_multiprocessor in _SPLITS:
            programs = device.multiprocessors * per_multiprocessor
            yield from split_configs(problem, counts, _SPLIT_WARPS, device.warp_size, programs)
    elif strategy == "pipelined":
        yield from _pipelined_configs(problem, counts, _PIPELINED_WARPS, device)
    else:
        known = ", ".join(STRATEGIES + UNVERIFIED)
        raise ValueError(f"plan_override: strategy must be one of {known}; got {strategy!r}.")


def _resident_configs(problem: Problem, counts: list[int], device: Device) -> Iterator[Config]:
    """Yield the ``resident_configs`` whose number of warps suits their elements."""
    num_warps = 1
    while num_warps <= _MAX_WARPS:
        for config in resident_configs(problem, counts, num_warps, device.warp_size):
            if num_warps == _resident_warps(problem, config.tile.elements, device.warp_size):
                yield config
        num_warps *= 2


def _pipelined_configs(
    problem: Problem, counts: list[int], num_warps: int, device: Device
) -> Iterator[Config]:
    """Yield ``split_configs`` as pipelines: one iteration per work item, and as many
    programs as run at a time."""
    for split in split_configs(problem, counts, num_warps, device.warp_size, _MANY):
        blocks = 1
        if problem.channels_last:  # adjacent blocks make whole pages of DRAM
            count = math.ceil(problem.groups / split.tile.groups)
            held = int(_STAGE_SHARE * device.l2_bytes)
            most = min(count, held // (split.tile.groups * group_bytes(problem)))
            blocks = next((b for b in range(most, 1, -1) if count % b == 0), 1)
        persistent_programs = guessed_ctas(problem, split, device) * device.multiprocessors
        persistent_programs = min(persistent_programs, split.programs(problem))
        yield replace(
            split, strategy="pipelined", blocks=blocks, persistent_programs=persistent_programs
        )


def _resident_warps(problem: Problem, elements: int, warp_size: int) -> int:
    per_thread = _FLOAT64_PER_THREAD if problem.itemsize == 8 else _ELEMENTS_PER_THREAD
    warps = math.ceil(elements / (warp_size * per_thread))
    return min(_MAX_WARPS, 1 << max(warps - 1, 0).bit_length())


def _overridden(problem: Problem, config: Config, device: Device, fixed: dict[str, Any]) -> Config:
    """Return the config with the fields of ``fixed`` and all fields that depend on them."""
    tile = config.tile
    fields = fields_of(config) | fixed
    for name in fixed.keys() - fields_of(config).keys():
        owner = next(strategy for strategy, own in OWN_FIELDS.items() if name in own)
        raise ValueError(f"plan_override: {config.strategy} has no {name}; add strategy={owner!r}.")
    if config.strategy != "resident" and "pixel_tiles" not in fixed:
        fields["pixel_tiles"] = max(1, tile.elements // (fields["rows"] * fields["cols"]))
    config = config_of(problem, **fields)
    reason = fits(problem, config, device)
    if reason is not None:
        raise ValueError(f"plan_override: {reason}.")
    return config


def _no_plan(problem: Problem, strategies: tuple[str, ...], groups: int | None) -> str:
    which = "any number of" if groups is None else f"{groups}"
    return (
        f"plan_override: no {' or '.join(strategies)} program can hold {which} whole groups of "
        f"{problem.group_elements} elements in its registers. "
        "Leave strategy and groups to the planner."
    )
