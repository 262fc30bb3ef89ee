"""Decisions: which strategy, which tile, how many warps. Imports neither torch nor triton."""

from .limits import capacity, fits
from .model import estimated_us
from .planner import ALWAYS_RESIDENT, OVERRIDES, plan, rivals
from .problem import Config, Device, Problem, Tile
from .tiles import next_power_of_2

__all__ = [
    "ALWAYS_RESIDENT", "OVERRIDES", "Config", "Device", "Problem", "Tile", "capacity",
    "estimated_us", "fits", "next_power_of_2", "plan", "rivals",
]  # fmt: skip
