"""Candidate plans: which fragments cover a problem, and with how little waste."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .config import Config, Tile
from .problem import Problem

# what a plan is told apart by; all else in it follows from these and the problem
_CUT = ("pixel_tiles", "splits")
# those that not every strategy has
OWN_FIELDS = {"resident": (), "split": _CUT, "pipelined": (*_CUT, "blocks", "persistent_programs")}
FIELDS = ("strategy", "groups", "rows", "cols", "num_warps", *OWN_FIELDS["pipelined"])
MAX_FRAGMENTS = 16  # unrolled in the kernel: more is slow to compile
MAX_PARTIALS = 1024  # partials, of all groups of a program, that split merges
_PARTIALS_AT_A_TIME = 32  # whatever there are of a group: sizes share kernels
MAX_BLOCK_CHANNELS = 256  # of several groups side by side: they are summed up by selection
_SECTOR_BYTES = 32  # a fragment that is narrower reads what it does not use
_PER_THREAD = (4, 8, 16, 32)  # elements of a fragment
_ITERATION_BYTES = {"forward": 32768, "backward": 16384}  # that a program of split holds in float32
_MAX_ITERATIONS = 16  # per split: shorter splits even out when programs end


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def make_tile(
    problem: Problem,
    groups: int,
    rows: int,
    cols: int,
    channel_tiles: int,
    pixel_tiles: int,
    batch_rows: bool = False,
) -> Tile:
    """A tile with its derived fields; ``pixel_tiles`` fragments are what one step covers."""
    vec, channels_per_row = problem.vec, problem.channels_per_row
    if problem.channels_last:
        block = groups * problem.group_channels
        mask_rows = (problem.n if batch_rows else problem.pixels) % (rows * pixel_tiles) != 0
        mask_cols = block % (cols * channel_tiles) != 0 or problem.channels % block != 0
    else:
        mask_rows = problem.group_channels // channels_per_row % (rows * channel_tiles) != 0
        mask_cols = problem.row_vecs * vec % (cols * pixel_tiles) != 0
    return Tile(
        problem.channels_last, vec, channels_per_row, problem.group_channels, groups,
        rows if batch_rows else next_power_of_2(groups), rows, cols, channel_tiles, pixel_tiles,
        mask_rows, mask_cols, batch_rows,
    )  # fmt: skip


def can_stack(problem: Problem, groups: int) -> bool:
    """Whether a block of one group may be that of many samples, one in each row."""
    one_pixel = problem.channels_last and problem.pixels == 1
    return one_pixel and groups == 1 and not problem.per_sample


def block_extent(problem: Problem, groups: int, batch_rows: bool = False) -> tuple[int, int]:
    """Memory rows and columns of a block of whole groups of one sample, or of all if batch_rows."""
    if problem.channels_last:
        return problem.n if batch_rows else problem.pixels, groups * problem.group_channels
    return problem.group_channels // problem.channels_per_row, problem.row_vecs * problem.vec


def group_counts(problem: Problem) -> list[int]:
    """How many whole groups may lie side by side in a block.

    Contiguous groups are iterations of memory of their own: one. Channels-last, for each padded
    width the most that fill it and start on a vector, so that accesses stay wide; narrow enough to
    be summed up by selection. One group alone may be of any width.
    """
    counts = {1}
    width = next_power_of_2(problem.group_channels)
    while problem.channels_last and width <= MAX_BLOCK_CHANNELS:
        most = min(width // problem.group_channels, problem.groups)
        aligned = (
            groups
            for groups in range(most, 0, -1)
            if groups * problem.group_channels % problem.vec == 0
        )
        counts |= {next(aligned, 1)}
        width *= 2
    return sorted(counts)


def fragments(
    problem: Problem, groups: int, threads: int, batch_rows: bool = False
) -> Iterator[tuple[int, int]]:
    """Shapes [rows, cols] of fragments that read whole sectors, and whole vectors a thread.

    A small block is padded up to one vector a thread: idle lanes cost less than narrow accesses.
    """
    block_rows, block_cols = block_extent(problem, groups, batch_rows)
    widest = next_power_of_2(block_cols)
    narrowest = min(widest, _SECTOR_BYTES // problem.itemsize)
    if groups > 1:
        narrowest = widest  # one fragment must see all channels to sum groups up
    elif batch_rows:
        narrowest = min(widest, threads * problem.vec)  # rows lie far apart
    for per_thread in _PER_THREAD:
        if per_thread < problem.vec:
            continue
        cols = min(widest, threads * per_thread)
        while cols >= narrowest:
            rows = threads * per_thread // cols
            yield max(min(rows, next_power_of_2(block_rows)), threads * problem.vec // cols), cols
            cols //= 2


def resident_configs(
    problem: Problem, group_counts: list[int], num_warps: int, warp_size: int
) -> Iterator[Config]:
    """Every way to hold a block of whole groups in ``num_warps`` warps."""
    for groups in group_counts:
        batch_rows = can_stack(problem, groups)
        for rows, cols in fragments(problem, groups, num_warps * warp_size, batch_rows):
            yield config_of(
                problem, strategy="resident", groups=groups, rows=rows, cols=cols,
                num_warps=num_warps,
            )  # fmt: skip


def split_configs(
    problem: Problem, group_counts: list[int], num_warps: int, warp_size: int, programs: int
) -> Iterator[Config]:
    """Ways to share each group among programs, about ``programs`` in all.

    A program takes one fragment's worth of channels and walks along the pixels in iterations of
    ``pixel_tiles`` fragments, which it holds on chip.
    """
    held = (
        _ITERATION_BYTES[problem.direction] // max(problem.itemsize, 4) // problem.channels_per_row
    )
    for groups in group_counts:
        block_rows, block_cols = block_extent(problem, groups)
        one_by_one = problem.access_bytes(groups) == problem.itemsize
        iteration = held // 2 if one_by_one else held
        if problem.itemsize == 8 and problem.activation != "none":
            iteration //= 4  # the functions of float64 need registers of their own
        for rows, cols in fragments(problem, groups, num_warps * warp_size):
            channels, per_part, pixels, per_tile = (
                (block_cols, cols, block_rows, rows)
                if problem.channels_last
                else (block_rows, rows, block_cols, cols)
            )
            parts = math.ceil(channels / per_part)
            pixel_tiles = max(1, iteration // (rows * cols))
            pixel_tiles = min(pixel_tiles, math.ceil(pixels / per_tile))
            tile = make_tile(problem, groups, rows, cols, 1, pixel_tiles)
            iterations = math.ceil(pixels / (per_tile * pixel_tiles))
            blocks = problem.n * math.ceil(problem.groups / groups) * parts
            most = max(1, MAX_PARTIALS // tile.padded_groups // parts)
            splits = max(math.ceil(programs / blocks), math.ceil(iterations / _MAX_ITERATIONS))
            yield make_split(problem, tile, num_warps, min(splits, iterations, most))


def partials_at_a_time(groups: int) -> int:
    """How many partials of each of its ``groups`` a program merges at a time."""
    return min(_PARTIALS_AT_A_TIME, MAX_PARTIALS // groups)


def _iteration(problem: Problem, tile: Tile) -> tuple[int, int]:
    """How long the pixels of a group are, and one iteration of them: vectors, or pixels
    channels-last."""
    if problem.channels_last:
        return problem.pixels, tile.rows * tile.pixel_tiles
    # less than a vector is refused by ``fits``
    return problem.row_vecs, max(1, tile.cols * tile.pixel_tiles // tile.vec)


def iterations(problem: Problem, tile: Tile) -> int:
    """How many iterations of ``pixel_tiles`` fragments the pixels of a group take."""
    length, step = _iteration(problem, tile)
    return math.ceil(length / step)


def make_split(problem: Problem, tile: Tile, num_warps: int, splits: int) -> Config:
    """A split plan of at most ``splits`` splits of whole iterations, none of them empty."""
    length, step = _iteration(problem, tile)
    split_vecs = math.ceil(math.ceil(length / step) / splits) * step
    return Config("split", tile, num_warps, math.ceil(length / split_vecs), split_vecs)


def fields_of(config: Config) -> dict[str, Any]:
    """A plan's ``FIELDS``, as ``config_of`` takes them back."""
    tile = config.tile
    fields = {
        "strategy": config.strategy,
        "groups": tile.groups,
        "rows": tile.rows,
        "cols": tile.cols,
        "num_warps": config.num_warps,
    }
    cut = {
        "pixel_tiles": tile.pixel_tiles,
        "splits": config.splits,
        "blocks": config.blocks,
        "persistent_programs": config.persistent_programs,
    }
    return fields | {name: cut[name] for name in OWN_FIELDS[config.strategy]}


def config_of(
    problem: Problem,
    *,
    strategy: str,
    groups: int,
    rows: int,
    cols: int,
    num_warps: int,
    pixel_tiles: int = 1,
    splits: int = 1,
    blocks: int = 1,
    persistent_programs: int = 1,
) -> Config:
    """The plan of these fields for a problem, as near as its size allows; ``fits`` judges it."""
    batch_rows = strategy == "resident" and can_stack(problem, groups)
    block_rows, block_cols = block_extent(problem, groups)
    row_tiles, col_tiles = math.ceil(block_rows / rows), math.ceil(block_cols / cols)
    tiles = (col_tiles, row_tiles) if problem.channels_last else (row_tiles, col_tiles)
    if strategy != "resident":
        tile = make_tile(problem, groups, rows, cols, 1, min(pixel_tiles, tiles[1]))
        split = replace(make_split(problem, tile, num_warps, splits), strategy=strategy)
        if strategy == "pipelined":
            return replace(split, blocks=blocks, persistent_programs=persistent_programs)
        return split
    tile = make_tile(problem, groups, rows, cols, *tiles, batch_rows)
    extent = problem.pixels if problem.channels_last else problem.row_vecs
    return Config(strategy, tile, num_warps, 1, extent)
