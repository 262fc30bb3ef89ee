"""How long a plan should take: an estimate, to weigh plans against each other. Not measured."""

import math
from dataclasses import dataclass

from triton_gn.activations import TABLE

from .candidates import iterations
from .config import Config
from .devices import Device
from .limits import registers
from .problem import ACCESS_BYTES, Problem

_LAUNCH_US = 2.2
_NEXT_LAUNCH_US = 1.5  # of a launch that follows another
_ZEROS_US = 1.0  # of setting counters to 0 before a launch
_DRAM_SHARE = 0.9  # of the maker's figure, that a copy achieves
_L2_BYTES_PER_US = 45_000  # of one multiprocessor, all of them drawing
_SOLO_BYTES_PER_US = 57_000  # of one multiprocessor while the others are idle
_PROGRAM_US = 1.5  # from a program's first load to its last store, besides its bytes
_L2_SHARE = 0.5  # of L2 that holds what was just read
_SECTOR_BYTES = 32  # L2 hands out no less
# instructions of a thread for each element, by pass, without an activation: counted in the code for
# sm_90 (docs/measured.md)
_PER_ELEMENT = {"forward": (5, 5), "backward": (7, 8)}
_PER_PASS = 500  # of a thread, whatever its elements
_OTHER_REGISTERS = 40  # of a thread, for addresses, masks and sums
_REGISTER_UNIT = 256  # of a warp's registers


@dataclass(frozen=True)
class Estimate:
    """What a plan should take on a device, and why."""

    us: float
    bound: str  # the longest of "dram", "l2", "issue", "occupancy" and "launch"
    dram_bytes: int
    l2_bytes: int
    ctas_at_a_time: int  # on one multiprocessor
    waves: int  # how often the CTAs of a launch fill the GPU


def passes(problem: Problem) -> tuple[int, int]:
    """How often tensors of the input's size must be read and written, at the least."""
    if problem.direction == "forward":
        return 1 + problem.residual, 1
    return 2 + problem.residual, 1 + problem.residual  # with an activation, to z's gradient


def second_passes(problem: Problem, config: Config) -> int:
    """How often a plan reads such tensors besides."""
    if config.strategy == "resident":
        return 0
    return 1 if problem.direction == "forward" else passes(problem)[0]


def launches(problem: Problem, config: Config) -> int:
    """How many launches a plan takes when all gradients are asked for."""
    backward = problem.direction == "backward"
    if config.strategy == "resident":
        return 2 if backward and config.parts(problem) > 1 else 1
    if config.strategy == "pipelined":
        return 2 if backward else 1
    return 3 if backward and problem.pre_add else 2


def floor(moved: int, device: Device) -> tuple[float, str]:
    """Microseconds of a launch that moves so many bytes and does nothing else, and the bound."""
    us = moved / (device.dram_gb_per_s * 1e3 * _DRAM_SHARE)
    return _LAUNCH_US + us, "dram" if us > _LAUNCH_US else "launch"


def ctas_at_a_time(
    device: Device, num_warps: int, registers_per_thread: int, shared_bytes: int = 0
) -> int:
    """How many CTAs a multiprocessor holds; at least one, or they could not run at all."""
    per_warp = registers_per_thread * device.warp_size
    per_warp = math.ceil(per_warp / _REGISTER_UNIT) * _REGISTER_UNIT
    bounds = [
        device.max_ctas,
        device.max_warps // num_warps,
        device.registers // (per_warp * num_warps),
    ]
    if shared_bytes:
        bounds.append(device.shared_bytes // shared_bytes)
    return max(1, min(bounds))


def guessed_at_a_time(problem: Problem, config: Config, device: Device) -> int:
    """``ctas_at_a_time`` of a plan that is not compiled."""
    guess = registers(problem, config, device) + _OTHER_REGISTERS
    return ctas_at_a_time(device, config.num_warps, guess)


def estimate(
    problem: Problem, config: Config, device: Device, at_a_time: int | None = None
) -> Estimate:
    """What a plan should take; compiling it tells how many CTAs run ``at_a_time``."""
    if at_a_time is None:
        at_a_time = guessed_at_a_time(problem, config, device)
    tensor = problem.n * problem.channels * problem.pixels * problem.itemsize
    again = second_passes(problem, config) * tensor
    touched = sum(passes(problem)) * tensor + again
    dram_bytes = touched - _served(problem, config, device, again)
    l2_bytes = int(touched * _sector_waste(problem, config))

    rounds = 2 if again else 1
    ctas = config.programs(problem)
    per_multiprocessor = math.ceil(ctas / device.multiprocessors)
    waves = math.ceil(per_multiprocessor / at_a_time)
    share = touched / rounds / ctas
    elements = problem.n * problem.channels * problem.pixels / ctas
    executed = instructions(problem, config) * elements * padding(problem, config)
    executed += rounds * _PER_PASS * config.num_warps * device.warp_size
    issue_us = executed / (device.lanes * device.clock_mhz)  # of a CTA, alone
    # each reads before it computes: at first all CTAs of a multiprocessor together, later by turns
    less, more = sorted((share / _SOLO_BYTES_PER_US, issue_us / rounds))
    start = _PROGRAM_US + less
    in_turn = max(at_a_time * more, start + more)
    last = per_multiprocessor - (waves - 1) * at_a_time
    occupancy_us = start + (waves - 1) * in_turn + last * more
    launch_us = _LAUNCH_US + (launches(problem, config) - 1) * _NEXT_LAUNCH_US
    launch_us += _ZEROS_US * (config.strategy == "pipelined")
    narrow = math.sqrt(ACCESS_BYTES / problem.access_bytes(config.tile.groups))
    times = {
        "launch": launch_us,
        "dram": dram_bytes / (device.dram_gb_per_s * 1e3 * _DRAM_SHARE),
        "l2": l2_bytes * narrow / (device.multiprocessors * _L2_BYTES_PER_US),
        "issue": ctas * issue_us / device.multiprocessors,
        "occupancy": rounds * occupancy_us,
    }
    bound = max(times, key=times.__getitem__)
    del times["launch"]  # the others overlap
    us = launch_us + max(times.values())
    return Estimate(us, bound, dram_bytes, l2_bytes, at_a_time, waves)


def instructions(problem: Problem, config: Config) -> int:
    """How many a thread executes for each element, in all passes."""
    forward = problem.direction == "forward"
    first, second = _PER_ELEMENT[problem.direction]
    of_activation = TABLE[problem.activation].cost[not forward]
    times = 1 if forward or config.strategy == "resident" else 2
    return first + second + times * of_activation


def group_bytes(problem: Problem) -> int:
    """What a group has in the tensors that a second pass reads again."""
    tensors = 1 if problem.direction == "forward" else passes(problem)[0]
    return tensors * problem.group_elements * problem.itemsize


def _served(problem: Problem, config: Config, device: Device, again: int) -> int:
    """Bytes of the second pass that L2 still holds."""
    held = int(_L2_SHARE * device.l2_bytes)
    if config.strategy == "pipelined":
        between = (
            config.prefetch_distance(problem)
            * config.blocks
            * config.tile.groups
            * group_bytes(problem)
        )
        return again if between <= held else again * held // between
    return min(again, held)


def _sector_waste(problem: Problem, config: Config) -> float:
    """Bytes of the sectors that a block's rows touch, over the rows' own bytes."""
    tile = config.tile
    if not problem.channels_last or tile.groups >= problem.groups:
        return 1.0
    width = tile.groups * tile.group_channels * problem.itemsize
    touched = width + _SECTOR_BYTES - math.gcd(width, _SECTOR_BYTES)  # on average
    return touched / width


def padding(problem: Problem, config: Config) -> float:
    """Elements of all fragments that a plan goes over, over those of the tensor."""
    covered = config.programs(problem) // config.splits * config.tile.elements
    if config.strategy != "resident":
        covered *= iterations(problem, config.tile)
    return covered / (problem.n * problem.channels * problem.pixels)
