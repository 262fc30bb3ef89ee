"""From a problem and a device to a plan: override, then the analytical rule."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .limits import excess_registers, fits, is_always_resident
from .model import estimated_us
from .problem import Config, Device, Problem
from .tiles import (
    block_extent,
    group_counts,
    make_split,
    make_tile,
    resident_configs,
    split_configs,
)

STRATEGIES = ("resident", "split")
OVERRIDES = ("strategy", "groups", "rows", "cols", "num_warps", "chunks")
_ELEMENTS_PER_THREAD = 32
_FLOAT64_PER_THREAD = 8
_FEW_SUB_TILES = 8  # up to here small ones are better: their accumulators take fewer registers
_MAX_WARPS = 8  # 16 halve the registers of a thread: large tiles spill
_SPLIT_WARPS = 4
_SPLIT_PROGRAMS_PER_MULTIPROCESSOR = 8


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Problem,
    device: Device,
    batch_invariant: bool = False,
    override: tuple[tuple[str, Any], ...] = (),
) -> Config:
    """The plan for a problem.

    ``batch_invariant`` plans for a batch of one, whatever the batch. ``override`` fixes the fields
    that it names (OVERRIDES).

    Raises:
        ValueError: no plan with these overrides can run.
    """
    if batch_invariant:
        problem = replace(problem, n=1)
    fixed = dict(override)
    strategies = (fixed.pop("strategy"),) if "strategy" in fixed else STRATEGIES
    for name, value in fixed.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"plan_override: {name} must be an int of at least 1; got {value!r}.")
    groups = fixed.pop("groups", None)
    best = [
        config
        for strategy in strategies
        if (config := _best(strategy, problem, device, groups)) is not None
    ]
    if not best:
        raise ValueError(_no_plan(problem, strategies, groups))
    config = best[0]
    if not is_always_resident(problem):
        config = min(best, key=lambda config: estimated_us(problem, config, device))
    return _overridden(problem, config, fixed) if fixed else config


def rivals(problem: Problem, device: Device) -> dict[str, float]:
    """The model's time for the best plan of each strategy that can run, in microseconds."""
    best = {strategy: _best(strategy, problem, device, None) for strategy in STRATEGIES}
    return {
        strategy: estimated_us(problem, config, device)
        for strategy, config in best.items()
        if config is not None
    }


def _best(strategy: str, problem: Problem, device: Device, groups: int | None) -> Config | None:
    """The fastest plan of a strategy by the model, among those with the widest accesses; of equals,
    the one with the least code."""
    candidates = [
        config
        for config in _candidates(strategy, problem, device, groups)
        if fits(problem, config) is None
    ]
    if not candidates:
        return None
    widest = max(problem.access_bytes(config.tile.groups) for config in candidates)
    return min(
        (config for config in candidates if problem.access_bytes(config.tile.groups) == widest),
        key=lambda config: (
            excess_registers(problem, config),
            round(estimated_us(problem, config, device), 1),
            max(_FEW_SUB_TILES, config.tile.channel_tiles * config.tile.pixel_tiles),
            config.tile.elements,
            config.tile.rows * config.tile.cols,
            config.num_warps,
        ),
    )


def _candidates(
    strategy: str, problem: Problem, device: Device, groups: int | None
) -> Iterator[Config]:
    counts = group_counts(problem) if groups is None else [groups]
    if strategy == "resident":
        num_warps = 1
        while num_warps <= _MAX_WARPS:
            for config in resident_configs(problem, counts, num_warps, device.warp_size):
                if num_warps == _resident_warps(problem, config.tile.elements, device.warp_size):
                    yield config
            num_warps *= 2
    elif strategy == "split":
        programs = device.multiprocessors * _SPLIT_PROGRAMS_PER_MULTIPROCESSOR
        yield from split_configs(problem, counts, _SPLIT_WARPS, device.warp_size, programs)
    else:
        raise ValueError(
            f"plan_override: strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}."
        )


def _resident_warps(problem: Problem, elements: int, warp_size: int) -> int:
    per_thread = _FLOAT64_PER_THREAD if problem.itemsize == 8 else _ELEMENTS_PER_THREAD
    warps = math.ceil(elements / (warp_size * per_thread))
    return min(_MAX_WARPS, 1 << max(warps - 1, 0).bit_length())


def _overridden(problem: Problem, config: Config, fixed: dict[str, Any]) -> Config:
    """The plan with the fields of ``fixed``, everything that depends on them worked out again."""
    tile = config.tile
    rows, cols = fixed.get("rows", tile.rows), fixed.get("cols", tile.cols)
    block_rows, block_cols = block_extent(problem, tile.groups)
    row_tiles, col_tiles = math.ceil(block_rows / rows), math.ceil(block_cols / cols)
    channel_tiles, pixel_tiles = (
        (col_tiles, row_tiles) if problem.channels_last else (row_tiles, col_tiles)
    )
    num_warps = fixed.get("num_warps", config.num_warps)
    if config.strategy == "split":
        pixel_tiles = min(pixel_tiles, max(1, tile.elements // (rows * cols)))
        tile = make_tile(problem, tile.groups, rows, cols, 1, pixel_tiles)
        config = make_split(problem, tile, num_warps, fixed.get("chunks", config.chunks))
    else:
        if "chunks" in fixed:
            raise ValueError("plan_override: chunks is a field of split; add strategy='split'.")
        tile = make_tile(problem, tile.groups, rows, cols, channel_tiles, pixel_tiles)
        config = replace(config, tile=tile, num_warps=num_warps)
    reason = fits(problem, config)
    if reason is not None:
        raise ValueError(f"plan_override: {reason}.")
    return config


def _no_plan(problem: Problem, strategies: tuple[str, ...], groups: int | None) -> str:
    which = "any number of" if groups is None else f"{groups}"
    return (
        f"plan_override: no {' or '.join(strategies)} program can hold {which} whole groups of "
        f"{problem.group_elements} elements in its registers. "
        "Leave strategy and groups to the rule."
    )
