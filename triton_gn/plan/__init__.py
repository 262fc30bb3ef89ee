"""Decisions: which strategy, which tile, how many warps. Imports neither torch nor triton."""

from .limits import fits, is_always_resident
from .model import estimated_us
from .planner import OVERRIDES, plan, rivals
from .problem import Config, Device, Problem, Tile
from .tiles import next_power_of_2, slots_at_a_time

__all__ = [
    "OVERRIDES", "Config", "Device", "Problem", "Tile", "estimated_us", "fits",
    "is_always_resident", "next_power_of_2", "plan", "rivals", "slots_at_a_time",
]  # fmt: skip
