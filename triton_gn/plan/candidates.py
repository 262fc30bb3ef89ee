"""Candidate plans: which sub-tiles cover a problem, and with how little waste."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .config import Config, Tile
from .problem import Problem

# what a plan is told apart by; all else in it follows from these and the problem
_CUT = ("pixel_tiles", "chunks")
# those that not every strategy has
OWN_FIELDS = {"resident": (), "split": _CUT, "pipelined": (*_CUT, "blocks", "workers")}
FIELDS = ("strategy", "groups", "rows", "cols", "num_warps", *OWN_FIELDS["pipelined"])
MAX_SUB_TILES = 16  # unrolled in the kernel: more is slow to compile
MAX_SLOTS = 1024  # partials, of all groups of a program, that split merges
_SLOTS_AT_A_TIME = 32  # whatever there are of a group: sizes share kernels
MAX_BLOCK_CHANNELS = 256  # of several groups side by side: they are summed up by selection
_SECTOR_BYTES = 32  # a sub-tile that is narrower reads what it does not use
_PER_THREAD = (4, 8, 16, 32)  # elements of a sub-tile
_STRETCH_BYTES = {"forward": 32768, "backward": 16384}  # that a program of split holds in float32
_MAX_STRETCHES = 16  # per chunk: shorter chunks even out when programs end


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def make_tile(
    problem: Problem,
    groups: int,
    rows: int,
    cols: int,
    channel_tiles: int,
    pixel_tiles: int,
    stacked: bool = False,
) -> Tile:
    """A tile with its derived fields; ``pixel_tiles`` sub-tiles are what one step covers."""
    vec, span = problem.vec, problem.span
    if problem.channels_last:
        block = groups * problem.group_channels
        mask_rows = (problem.n if stacked else problem.pixels) % (rows * pixel_tiles) != 0
        mask_cols = block % (cols * channel_tiles) != 0 or problem.channels % block != 0
    else:
        mask_rows = problem.group_channels // span % (rows * channel_tiles) != 0
        mask_cols = problem.row_vecs * vec % (cols * pixel_tiles) != 0
    return Tile(
        problem.channels_last, vec, span, problem.group_channels, groups,
        rows if stacked else next_power_of_2(groups), rows, cols, channel_tiles, pixel_tiles,
        mask_rows, mask_cols, stacked,
    )  # fmt: skip


def can_stack(problem: Problem, groups: int) -> bool:
    """Whether a block of one group may be that of many samples, one in each row."""
    one_pixel = problem.channels_last and problem.pixels == 1
    return one_pixel and groups == 1 and not problem.per_sample


def block_extent(problem: Problem, groups: int, stacked: bool = False) -> tuple[int, int]:
    """Memory rows and columns of a block of whole groups of one sample, or of all if stacked."""
    if problem.channels_last:
        return problem.n if stacked else problem.pixels, groups * problem.group_channels
    return problem.group_channels // problem.span, problem.row_vecs * problem.vec


def group_counts(problem: Problem) -> list[int]:
    """How many whole groups may lie side by side in a block.

    Contiguous groups are stretches of memory of their own: one. Channels-last, for each padded
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


def sub_tiles(
    problem: Problem, groups: int, threads: int, stacked: bool = False
) -> Iterator[tuple[int, int]]:
    """Shapes [rows, cols] of sub-tiles that read whole sectors, and whole vectors a thread.

    A small block is padded up to one vector a thread: idle lanes cost less than narrow accesses.
    """
    block_rows, block_cols = block_extent(problem, groups, stacked)
    widest = next_power_of_2(block_cols)
    narrowest = min(widest, _SECTOR_BYTES // problem.itemsize)
    if groups > 1:
        narrowest = widest  # one sub-tile must see all channels to sum groups up
    elif stacked:
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
        stacked = can_stack(problem, groups)
        for rows, cols in sub_tiles(problem, groups, num_warps * warp_size, stacked):
            yield config_of(
                problem, strategy="resident", groups=groups, rows=rows, cols=cols,
                num_warps=num_warps,
            )  # fmt: skip


def split_configs(
    problem: Problem, group_counts: list[int], num_warps: int, warp_size: int, programs: int
) -> Iterator[Config]:
    """Ways to share each group among programs, about ``programs`` in all.

    A program takes one sub-tile's worth of channels and walks along the pixels in stretches of
    ``pixel_tiles`` sub-tiles, which it holds on chip.
    """
    held = _STRETCH_BYTES[problem.direction] // max(problem.itemsize, 4) // problem.span
    for groups in group_counts:
        block_rows, block_cols = block_extent(problem, groups)
        one_by_one = problem.access_bytes(groups) == problem.itemsize
        stretch = held // 2 if one_by_one else held
        if problem.itemsize == 8 and problem.activation != "none":
            stretch //= 4  # the functions of float64 need registers of their own
        for rows, cols in sub_tiles(problem, groups, num_warps * warp_size):
            channels, per_part, pixels, per_tile = (
                (block_cols, cols, block_rows, rows)
                if problem.channels_last
                else (block_rows, rows, block_cols, cols)
            )
            parts = math.ceil(channels / per_part)
            pixel_tiles = max(1, stretch // (rows * cols))
            pixel_tiles = min(pixel_tiles, math.ceil(pixels / per_tile))
            tile = make_tile(problem, groups, rows, cols, 1, pixel_tiles)
            stretches = math.ceil(pixels / (per_tile * pixel_tiles))
            blocks = problem.n * math.ceil(problem.groups / groups) * parts
            most = max(1, MAX_SLOTS // tile.group_slots // parts)
            chunks = max(math.ceil(programs / blocks), math.ceil(stretches / _MAX_STRETCHES))
            yield make_split(problem, tile, num_warps, min(chunks, stretches, most))


def slots_at_a_time(groups: int) -> int:
    """How many partials of each of its ``groups`` a program merges at a time."""
    return min(_SLOTS_AT_A_TIME, MAX_SLOTS // groups)


def _stretch(problem: Problem, tile: Tile) -> tuple[int, int]:
    """How long the pixels of a group are, and one stretch of them: vectors, or pixels
    channels-last."""
    if problem.channels_last:
        return problem.pixels, tile.rows * tile.pixel_tiles
    # less than a vector is refused by ``fits``
    return problem.row_vecs, max(1, tile.cols * tile.pixel_tiles // tile.vec)


def stretches(problem: Problem, tile: Tile) -> int:
    """How many stretches of ``pixel_tiles`` sub-tiles the pixels of a group take."""
    length, step = _stretch(problem, tile)
    return math.ceil(length / step)


def make_split(problem: Problem, tile: Tile, num_warps: int, chunks: int) -> Config:
    """A split plan of at most ``chunks`` chunks of whole stretches, none of them empty."""
    length, step = _stretch(problem, tile)
    chunk_vecs = math.ceil(math.ceil(length / step) / chunks) * step
    return Config("split", tile, num_warps, math.ceil(length / chunk_vecs), chunk_vecs)


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
        "chunks": config.chunks,
        "blocks": config.blocks,
        "workers": config.workers,
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
    chunks: int = 1,
    blocks: int = 1,
    workers: int = 1,
) -> Config:
    """The plan of these fields for a problem, as near as its size allows; ``fits`` judges it."""
    stacked = strategy == "resident" and can_stack(problem, groups)
    block_rows, block_cols = block_extent(problem, groups)
    row_tiles, col_tiles = math.ceil(block_rows / rows), math.ceil(block_cols / cols)
    tiles = (col_tiles, row_tiles) if problem.channels_last else (row_tiles, col_tiles)
    if strategy != "resident":
        tile = make_tile(problem, groups, rows, cols, 1, min(pixel_tiles, tiles[1]))
        split = replace(make_split(problem, tile, num_warps, chunks), strategy=strategy)
        if strategy == "pipelined":
            return replace(split, blocks=blocks, workers=workers)
        return split
    tile = make_tile(problem, groups, rows, cols, *tiles, stacked)
    extent = problem.pixels if problem.channels_last else problem.row_vecs
    return Config(strategy, tile, num_warps, 1, extent)
