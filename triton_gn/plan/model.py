"""How long a plan should take: an estimate, to weigh plans against each other. Not measured."""

import math

from .problem import ACCESS_BYTES, Config, Device, Problem

_LAUNCH_US = 2.2
_DRAM_BYTES_PER_US = 3.0e6  # achieved by a copy on an H100
_L2_SPEEDUP = 2.0  # of a second read that L2 still holds
_L2_SHARE = 0.5  # of L2 that holds what was just read
_SOLO_SPEEDUP = 2.5  # of one multiprocessor's bandwidth while the others are idle
_DRAM_ACCESS_BYTES = 64  # narrower rows waste part of it, unless a neighbour fetches the rest


def estimated_us(problem: Problem, config: Config, device: Device) -> float:
    tensor = problem.n * problem.channels * problem.pixels * problem.itemsize
    forward = problem.direction == "forward"
    reads = (1 if forward else 2) + problem.residual
    writes = 1 if forward else 1 + problem.residual  # the residual's gradient
    traffic = float((reads + writes) * tensor)
    launches = 1
    if config.strategy == "split":
        again = 1 if forward else reads
        cached = again * tensor < _L2_SHARE * device.l2_bytes
        traffic += again * tensor / (_L2_SPEEDUP if cached else 1.0)
        launches = 2
    tile = config.tile
    if problem.channels_last and tile.groups < problem.groups:
        width = tile.groups * tile.group_channels * problem.itemsize
        traffic *= math.sqrt(max(1.0, _DRAM_ACCESS_BYTES / width))
    traffic *= math.sqrt(ACCESS_BYTES / problem.access_bytes(tile.groups))
    bandwidth = _DRAM_BYTES_PER_US * device.multiprocessors / Device().multiprocessors
    whole_gpu = traffic / bandwidth
    # the busiest multiprocessor: how many programs it runs, at what it can draw by itself
    waves = -(-config.programs(problem) // device.multiprocessors)
    padding = tile.elements / held_elements(problem, config)
    share = traffic / config.programs(problem) * padding
    busiest = waves * share / (bandwidth / device.multiprocessors * _SOLO_SPEEDUP)
    return launches * _LAUNCH_US + max(whole_gpu, busiest)


def held_elements(problem: Problem, config: Config) -> float:
    """Elements of the tensor that a program holds at a time, without the padding of its tile."""
    tile = config.tile
    if config.strategy == "resident":
        return tile.groups * problem.group_elements
    block = tile.groups * problem.group_elements / config.slots
    return min(block, tile.elements)
