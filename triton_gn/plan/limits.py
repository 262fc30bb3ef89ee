"""What can run at all: the bounds that every plan is checked against, from whatever source."""

from .problem import Config, Problem
from .tiles import MAX_SLOTS, MAX_SUB_TILES, block_extent

# elements per program, padding included, that compile for sm_80 and sm_90 without a spill
# (docs/measured.md); float64 takes twice the registers
_CAPACITY = {
    ("forward", False): 49152,
    ("forward", True): 32768,
    ("backward", False): 24576,
    ("backward", True): 24576,
}


def capacity(problem: Problem) -> int:
    """Most elements that a program may hold on chip."""
    elements = _CAPACITY[problem.direction, problem.channels_last]
    return elements // 2 if problem.itemsize == 8 else elements


def fits(problem: Problem, config: Config) -> str | None:
    """Why the plan cannot run, as a sentence; None if it can."""
    tile = config.tile
    if config.strategy not in ("resident", "split"):
        return f"the strategy must be resident or split; got {config.strategy!r}"
    for name in ("rows", "cols"):
        size = getattr(tile, name)
        if size < 1 or size & (size - 1):
            return f"{name} must be a power of two; got {size}"
    if config.num_warps not in (1, 2, 4, 8, 16, 32):
        return f"num_warps must be a power of two up to 32; got {config.num_warps}"
    if not 1 <= tile.groups <= problem.groups:
        return f"groups must be between 1 and {problem.groups}; got {tile.groups}"
    if tile.groups > 1 and not problem.channels_last:
        return f"a contiguous program owns one group; got groups={tile.groups}"
    rows, cols = block_extent(problem, tile.groups)
    if tile.groups > 1 and tile.cols < cols:
        return f"cols must hold the {cols} channels of {tile.groups} groups; got {tile.cols}"
    if tile.channel_tiles * tile.pixel_tiles > MAX_SUB_TILES:
        return (
            f"a program holds at most {MAX_SUB_TILES} sub-tiles; "
            f"got {tile.channel_tiles * tile.pixel_tiles}"
        )
    if tile.elements > capacity(problem):
        return f"a program holds at most {capacity(problem)} elements; got {tile.elements}"
    if min(tile.rows, rows) * problem.row_vecs * tile.vec >= 2**31 and tile.rows > 1:
        return f"a sub-tile must lie within 2**31 elements; {tile.rows} rows do not"
    if config.slots * tile.group_slots > MAX_SLOTS:
        return (
            f"at most {MAX_SLOTS} partials are merged by one program; "
            f"got {config.slots} for each of {tile.group_slots} groups"
        )
    return None
