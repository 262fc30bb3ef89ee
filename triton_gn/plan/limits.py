"""Check that a plan can run: the bounds hold for plans from any source."""

from .candidates import MAX_BLOCK_CHANNELS, MAX_FRAGMENTS, OWN_FIELDS, block_extent
from .config import Config
from .devices import Device
from .problem import Problem

ALWAYS_RESIDENT = 8192  # elements of a group: a second launch costs more than idle multiprocessors
# registers per thread for fragments and accumulators, by direction and channels-last; with more,
# some kernel spills on sm_80, sm_90 or sm_100 (docs/measured.md)
_REGISTERS = {
    ("forward", False): 208,
    ("forward", True): 144,
    ("backward", False): 168,
    ("backward", True): 176,
}
# for 16-bit channels-last backwards: with more, 2x2560x16x16 of float16 spills
_HALF_REGISTERS = 168
_FEWER_REGISTERS = 112  # if every element has an address, or every channel of a row a mask
_SPANNED_REGISTERS = 64  # if rows span channels and there are few channel tiles
_FEW_CHANNEL_TILES = 2
_FLOAT64_REGISTERS = {False: 96, True: 48}  # True: an activation, whose functions are calls
_MAX_ELEMENTS_PER_WARP = 2048  # of a fragment, even if spills are accepted
_MAX_PERSISTENT = 2**16
_CROWDED = 0.75  # fraction of the limit if there is one more value per channel or element


def registers(problem: Problem, config: Config, device: Device) -> int:
    """Return the registers per thread, of 255, that fragments and accumulators take."""
    tensors = 1 if problem.direction == "forward" else 2  # x; dz, or dy
    fragment = config.tile.rows * config.tile.cols
    words = max(problem.itemsize, 4) // 4 * (tensors * config.tile.elements + 2 * fragment)
    return words // (device.warp_size * config.num_warps)


def excess_registers(problem: Problem, config: Config, device: Device) -> int:
    """Return the registers per thread above the limit."""
    return max(0, registers(problem, config, device) - register_limit(problem, config))


def register_limit(problem: Problem, config: Config) -> int:
    """Return the limit of ``registers``."""
    limit = _register_limit(problem, config.tile.groups)
    if problem.channels_per_row > 1 and config.tile.channel_tiles <= _FEW_CHANNEL_TILES:
        limit = min(limit, _SPANNED_REGISTERS)
    return limit * min(8, config.num_warps) // config.num_warps  # more than 8 warps share 64 Ki


def _register_limit(problem: Problem, groups: int) -> int:
    if problem.itemsize == 8:
        return _FLOAT64_REGISTERS[problem.activation != "none"]
    limit = _REGISTERS[problem.direction, problem.channels_last]
    if _is_one_by_one(problem, groups) or problem.channels_per_row > 1:
        limit = _FEWER_REGISTERS
    if _is_crowded(problem):
        return int(limit * _CROWDED)
    halves = problem.itemsize == 2 and problem.direction == "backward" and problem.channels_last
    return min(limit, _HALF_REGISTERS) if halves else limit


def _is_crowded(problem: Problem) -> bool:
    return problem.pre_add or (problem.residual and problem.direction == "backward")


def _is_one_by_one(problem: Problem, groups: int) -> bool:
    return problem.access_bytes(groups) == problem.itemsize


def is_always_resident(problem: Problem) -> bool:
    """Return whether groups are so small that they stay on chip, even if some registers spill."""
    many_spills = problem.itemsize == 8 or (_is_crowded(problem) and _is_one_by_one(problem, 1))
    return problem.group_elements <= ALWAYS_RESIDENT and not many_spills


def _stalls(problem: Problem, config: Config) -> str | None:
    """Return why a pipelined config cannot run; None if it can."""
    blocks = -(-problem.groups // config.tile.groups)
    if config.blocks < 1 or blocks % config.blocks:
        return f"blocks must divide the {blocks} of a sample; got {config.blocks}"
    if not 1 <= config.persistent_programs <= _MAX_PERSISTENT:
        return (
            f"persistent_programs must be between 1 and {_MAX_PERSISTENT}; "
            f"got {config.persistent_programs}"
        )
    if 2 * config.programs(problem) + config.persistent_programs >= 2**31:
        return f"tickets must be less than 2**31; {config.programs(problem)} pieces take more"
    return None


def fits(problem: Problem, config: Config, device: Device) -> str | None:
    """Return why the plan cannot run, as a sentence; None if it can."""
    tile = config.tile
    if config.strategy not in OWN_FIELDS:
        return f"the strategy must be one of {', '.join(OWN_FIELDS)}; got {config.strategy!r}"
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
    rows, cols = block_extent(problem, tile.groups, tile.batch_rows)
    if tile.groups > 1 and tile.cols < cols:
        return f"cols must hold the {cols} channels of {tile.groups} groups; got {tile.cols}"
    if tile.groups > 1 and cols > MAX_BLOCK_CHANNELS:
        return (
            f"groups side by side may have {MAX_BLOCK_CHANNELS} channels in all; "
            f"{tile.groups} have {cols}"
        )
    iteration = tile.cols * tile.pixel_tiles
    if config.strategy != "resident" and not problem.channels_last and iteration % tile.vec:
        return f"cols * pixel_tiles must be a multiple of the vector, {tile.vec}; got {iteration}"
    if tile.rows * tile.cols > _MAX_ELEMENTS_PER_WARP * config.num_warps:
        return (
            f"a fragment may have {_MAX_ELEMENTS_PER_WARP} elements a warp; {tile.rows} rows of "
            f"{tile.cols} in {config.num_warps} warps have more"
        )
    if tile.channel_tiles * tile.pixel_tiles > MAX_FRAGMENTS:
        return (
            f"a program holds at most {MAX_FRAGMENTS} fragments; "
            f"got {tile.channel_tiles * tile.pixel_tiles}"
        )
    if config.strategy == "pipelined" and (reason := _stalls(problem, config)):
        return reason
    exempt = tile.groups == 1 and is_always_resident(problem)
    if excess_registers(problem, config, device) and not exempt:
        return (
            f"{tile.elements} elements in {config.num_warps} warps take "
            f"{registers(problem, config, device)} registers a thread; at most "
            f"{register_limit(problem, config)} are free"
        )
    if min(tile.rows, rows) * problem.row_vecs * tile.vec >= 2**31 and tile.rows > 1:
        return f"a fragment must lie within 2**31 elements; {tile.rows} rows do not"
    return None
