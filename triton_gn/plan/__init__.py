"""Decisions: which strategy, which tile, how many warps. Imports neither torch nor triton."""

from .devices import TARGETS, Device
from .limits import fits, is_always_resident
from .model import Estimate, estimate, launches, passes, programs_at_a_time
from .planner import STRATEGIES, UNVERIFIED, candidates, plan, plan_by_rule, rivals
from .problem import Config, Problem, Tile
from .tiles import FIELDS, config_of, fields_of, next_power_of_2, slots_at_a_time

__all__ = [
    "FIELDS", "STRATEGIES", "TARGETS", "UNVERIFIED", "Config", "Device", "Estimate", "Problem",
    "Tile", "candidates", "config_of", "estimate", "fields_of", "fits", "is_always_resident",
    "launches", "next_power_of_2", "passes", "plan", "plan_by_rule", "programs_at_a_time", "rivals",
    "slots_at_a_time",
]  # fmt: skip
