"""Estimate the time of a plan, to rank plans against each other. Nothing is measured."""

import math
from dataclasses import dataclass

from triton_gn.activations import TABLE, lookup

from .candidates import iterations
from .config import Config
from .devices import Device
from .limits import registers
from .problem import ACCESS_BYTES, Problem

_LAUNCH_US = 2.2
_NEXT_LAUNCH_US = 1.5  # a launch that follows another
_ZEROS_US = 1.0  # zeroing counters before a launch
_DRAM_SHARE = 0.9  # fraction of the nominal bandwidth that a copy achieves
_L2_BYTES_PER_US = 45_000  # per multiprocessor while all of them read
_SOLO_BYTES_PER_US = 57_000  # per multiprocessor while the others are idle
_PROGRAM_US = 1.5  # latency from a program's first load to its last store, without its bytes
_L2_SHARE = 0.5  # fraction of L2 that still holds the previous pass
_SECTOR_BYTES = 32  # smallest transfer from L2
# instructions of a thread per element and pass, without an activation: counted in sm_90 code
# (docs/measured.md)
_PER_ELEMENT = {"forward": (5, 5), "backward": (7, 8)}
_PER_PASS = 500  # instructions of a thread, whatever its elements
_OTHER_REGISTERS = 40  # per thread, for addresses, masks and sums
_REGISTER_UNIT = 256  # registers are allocated to a warp in multiples of this


@dataclass(frozen=True)
class Estimate:
    """The predicted time of a plan on a device, and its bound."""

    us: float
    bound: str  # "dram", "l2", "issue", "occupancy" or "launch": the longest of these times
    dram_bytes: int
    l2_bytes: int
    ctas_per_multiprocessor: int
    waves: int  # number of times that the CTAs of a launch fill the GPU


def passes(problem: Problem) -> tuple[int, int]:
    """Return the minimum of reads and writes of tensors of the input's size."""
    if problem.direction == "forward":
        return 1 + problem.residual, 1
    # a residual counts only if an activation follows: its gradient is written, and it is read again
    return 2 + problem.residual, 1 + problem.residual


def second_passes(problem: Problem, config: Config) -> int:
    """Return the further reads of such tensors by a plan's second pass."""
    if config.strategy == "resident":
        return 0
    return 1 if problem.direction == "forward" else passes(problem)[0]


def launches(problem: Problem, config: Config) -> int:
    """Return the number of launches of a plan if all gradients are needed."""
    backward = problem.direction == "backward"
    if config.strategy == "resident":
        return 2 if backward and config.parts(problem) > 1 else 1
    if config.strategy == "pipelined":
        return 2 if backward else 1
    return 3 if backward and problem.pre_add else 2


def speed_of_light(moved: int, device: Device) -> tuple[float, str]:
    """Return the microseconds of a launch that only moves bytes, and its bound."""
    us = moved / (device.dram_gb_per_s * 1e3 * _DRAM_SHARE)
    return _LAUNCH_US + us, "dram" if us > _LAUNCH_US else "launch"


def ctas_per_multiprocessor(
    device: Device, num_warps: int, registers_per_thread: int, shared_bytes: int = 0
) -> int:
    """Return the occupancy in CTAs; at least one, as the compiler ensures that a CTA fits."""
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


def guessed_ctas(problem: Problem, config: Config, device: Device) -> int:
    """Guess ``ctas_per_multiprocessor`` of a plan that is not compiled."""
    guess = registers(problem, config, device) + _OTHER_REGISTERS
    return ctas_per_multiprocessor(device, config.num_warps, guess)


def estimate(
    problem: Problem, config: Config, device: Device, resident_ctas: int | None = None
) -> Estimate:
    """Estimate the time of a plan.

    ``resident_ctas`` are the CTAs that a multiprocessor holds at a time; compiling tells them.
    """
    if resident_ctas is None:
        resident_ctas = guessed_ctas(problem, config, device)
    tensor = problem.n * problem.channels * problem.pixels * problem.itemsize
    again = second_passes(problem, config) * tensor
    touched = sum(passes(problem)) * tensor + again
    dram_bytes = touched - _served(problem, config, device, again)
    l2_bytes = int(touched * _sector_waste(problem, config))

    rounds = 2 if again else 1  # passes over the tensors
    ctas = config.programs(problem)
    per_multiprocessor = math.ceil(ctas / device.multiprocessors)
    waves = math.ceil(per_multiprocessor / resident_ctas)
    share = touched / rounds / ctas
    elements = problem.n * problem.channels * problem.pixels / ctas
    executed = instructions(problem, config) * elements * padding(problem, config)
    executed += rounds * _PER_PASS * config.num_warps * device.warp_size
    issue_us = executed / (device.lanes * device.clock_mhz)  # of one CTA running alone
    # in the first wave all resident CTAs load together; later waves interleave
    less, more = sorted((share / _SOLO_BYTES_PER_US, issue_us / rounds))
    start = _PROGRAM_US + less
    in_turn = max(resident_ctas * more, start + more)
    last = per_multiprocessor - (waves - 1) * resident_ctas
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
    del times["launch"]  # the other bounds run concurrently
    us = launch_us + max(times.values())
    return Estimate(us, bound, dram_bytes, l2_bytes, resident_ctas, waves)


def instructions(problem: Problem, config: Config) -> int:
    """Return the instructions of a thread per element, in all passes."""
    forward = problem.direction == "forward"
    first, second = _PER_ELEMENT[problem.direction]
    activation, _ = lookup(problem.activation) or (TABLE["none"], {})
    of_activation = activation.cost[not forward]
    times = 1 if forward or config.strategy == "resident" else 2
    return first + second + times * of_activation


def group_bytes(problem: Problem) -> int:
    """Return the bytes of a group in the tensors that a second pass reads again."""
    tensors = 1 if problem.direction == "forward" else passes(problem)[0]
    return tensors * problem.group_elements * problem.itemsize


def _served(problem: Problem, config: Config, device: Device, again: int) -> int:
    """Return the bytes of the second pass that L2 still holds."""
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
    """Return the bytes of the sectors that a block's rows touch, over the rows' own bytes."""
    tile = config.tile
    if not problem.channels_last or tile.groups >= problem.groups:
        return 1.0
    width = tile.groups * tile.group_channels * problem.itemsize
    touched = width + _SECTOR_BYTES - math.gcd(width, _SECTOR_BYTES)  # on average
    return touched / width


def padding(problem: Problem, config: Config) -> float:
    """Return the elements of all fragments of a plan, over the elements of the tensor."""
    covered = config.programs(problem) // config.splits * config.tile.elements
    if config.strategy != "resident":
        covered *= iterations(problem, config.tile)
    return covered / (problem.n * problem.channels * problem.pixels)
