"""Choose the config of a launch: strategy, tile, warps. Imports neither torch nor triton."""

from .candidates import FIELDS, config_of, fields_of, partials_at_a_time
from .config import Config, Tile
from .cost_model import Estimate, ctas_per_multiprocessor, estimate, passes
from .devices import TARGETS, Device
from .limits import fits, is_always_resident
from .planner import (
    STRATEGIES,
    UNVERIFIED,
    best_per_strategy,
    candidates,
    heuristic_plan,
    is_verified,
    plan,
    plan_unverified,
)
from .problem import Problem

__all__ = [
    "FIELDS",
    "STRATEGIES",
    "TARGETS",
    "UNVERIFIED",
    "Config",
    "Device",
    "Estimate",
    "Problem",
    "Tile",
    "best_per_strategy",
    "candidates",
    "config_of",
    "ctas_per_multiprocessor",
    "estimate",
    "fields_of",
    "fits",
    "heuristic_plan",
    "is_always_resident",
    "is_verified",
    "partials_at_a_time",
    "passes",
    "plan",
    "plan_unverified",
]  # fmt: skip
