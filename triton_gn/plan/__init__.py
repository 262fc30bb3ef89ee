"""Decisions: which strategy, which tile, how many warps. Imports neither torch nor triton."""

from .candidates import FIELDS, config_of, fields_of, slots_at_a_time
from .config import Config, Tile
from .cost_model import Estimate, ctas_at_a_time, estimate, passes
from .devices import TARGETS, Device
from .limits import fits, is_always_resident
from .planner import (
    STRATEGIES,
    UNVERIFIED,
    candidates,
    is_verified,
    plan,
    plan_by_rule,
    plan_unverified,
    rivals,
)
from .problem import Problem

__all__ = [
    "FIELDS", "STRATEGIES", "TARGETS", "UNVERIFIED", "Config", "Device",
    "Estimate", "Problem", "Tile", "candidates", "config_of", "ctas_at_a_time", "estimate",
    "fields_of", "fits", "is_always_resident", "is_verified",
    "passes", "plan", "plan_by_rule", "plan_unverified", "rivals",
    "slots_at_a_time",
]  # fmt: skip
