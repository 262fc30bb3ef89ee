"""Candidate configs: the fragments that cover a problem with little waste."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .config import Config, Tile
from .problem import Problem

# fields that identify a config; the rest is derived from them and the problem
_SPLIT_FIELDS = ("pixel_tiles", "splits")
# fields that not every strategy has
OWN_FIELDS = {
    "resident": (),
    "split": _SPLIT_FIELDS,
    "pipelined": (*_SPLIT_FIELDS, "blocks", "persistent_programs"),
}
FIELDS = ("strategy", "groups", "rows", "cols", "num_warps", *OWN_FIELDS["pipelined"])
MAX_FRAGMENTS = 16  # unrolled in the kernel: more is slow to compile
MAX_PARTIALS = 1024  # partials of all groups of a program that split merges
_PARTIALS_AT_A_TIME = 32  # a constant, so that all sizes share kernels
MAX_BLOCK_CHANNELS = 256  # of adjacent groups, which are summed by selection
_SECTOR_BYTES = 32  # a narrower fragment wastes a part of each sector
_PER_THREAD = (4, 8, 16, 32)  # elements of a fragment per thread
# float32 bytes that a program of split holds in an iteration
_ITERATION_BYTES = {"forward": 32768, "backward": 16384}
_MAX_ITERATIONS = 16  # per split: with shorter splits programs end at similar times


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
    """Make a tile with its derived fields; an iteration covers ``pixel_tiles`` fragments."""
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
    """Return whether a block of one group may hold many samples, one in each row."""
    one_pixel = problem.channels_last and problem.pixels == 1
    return one_pixel and groups == 1 and not problem.per_sample


def block_extent(problem: Problem, groups: int, batch_rows: bool = False) -> tuple[int, int]:
    """Return the memory rows and columns of a block of whole groups.

    The block has one sample; with batch_rows it has all samples.
    """
    if problem.channels_last:
        return problem.n if batch_rows else problem.pixels, groups * problem.group_channels
    return problem.group_channels // problem.channels_per_row, problem.row_vecs * problem.vec


def group_counts(problem: Problem) -> list[int]:
    """Return the numbers of whole groups that a block may hold.

    A contiguous block holds one group. A channels-last block may hold adjacent groups: for each
    padded width, as many as fit and start on a vector, so that accesses stay wide. The width is
    limited since adjacent groups are summed by selection; one group alone may have any width.
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
    """Yield shapes [rows, cols] of fragments: whole sectors, and a whole vector per thread.

    A small block is padded to one vector per thread: idle lanes cost less than narrow accesses.
    """
    block_rows, block_cols = block_extent(problem, groups, batch_rows)
    widest = next_power_of_2(block_cols)
    narrowest = min(widest, _SECTOR_BYTES // problem.itemsize)
    if groups > 1:
        narrowest = widest  # one fragment must hold all channels to sum the groups
    elif batch_rows:
        narrowest = min(widest, threads * problem.vec)  # rows are far apart in memory
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
    """Yield the configs that hold a block of whole groups in ``num_warps`` warps."""
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
    """Yield the configs that split each group among programs, about ``programs`` in all.

    A program takes the channels of one fragment and iterates over the pixels; it holds the
    ``pixel_tiles`` fragments of an iteration on chip.
    """
    held = (
        _ITERATION_BYTES[problem.direction] // max(problem.itemsize, 4) // problem.channels_per_row
    )
    for groups in group_counts:
        block_rows, block_cols = block_extent(problem, groups)
        one_by_one = problem.access_bytes(groups) == problem.itemsize
        iteration = held // 2 if one_by_one else held
        if problem.itemsize == 8 and problem.activation != "none":
            iteration //= 4  # float64 activations need registers of their own
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
    """Return how many partials of each of its ``groups`` a program merges at a time."""
    return min(_PARTIALS_AT_A_TIME, MAX_PARTIALS // groups)


def _iteration(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Return the length of a group and of an iteration: vectors, or channels-last pixels."""
    if problem.channels_last:
        return problem.pixels, tile.rows * tile.pixel_tiles
    # ``fits`` refuses less than a vector
    return problem.row_vecs, max(1, tile.cols * tile.pixel_tiles // tile.vec)


def iterations(problem: Problem, tile: Tile) -> int:
    """Return the number of iterations over the pixels of a group."""
    length, iteration = _iteration(problem, tile)
    return math.ceil(length / iteration)


def make_split(problem: Problem, tile: Tile, num_warps: int, splits: int) -> Config:
    """Make a config of at most ``splits`` splits of whole iterations, none of them empty."""
    length, iteration = _iteration(problem, tile)
    split_vecs = math.ceil(math.ceil(length / iteration) / splits) * iteration
    return Config("split", tile, num_warps, math.ceil(length / split_vecs), split_vecs)


def fields_of(config: Config) -> dict[str, Any]:
    """Return a config's ``FIELDS``; ``config_of`` is the inverse."""
    tile = config.tile
    fields = {
        "strategy": config.strategy,
        "groups": tile.groups,
        "rows": tile.rows,
        "cols": tile.cols,
        "num_warps": config.num_warps,
    }
    own = {
        "pixel_tiles": tile.pixel_tiles,
        "splits": config.splits,
        "blocks": config.blocks,
        "persistent_programs": config.persistent_programs,
    }
    return fields | {name: own[name] for name in OWN_FIELDS[config.strategy]}


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
    """Return the config of these fields, adapted to the problem's size; ``fits`` is not asked."""
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
