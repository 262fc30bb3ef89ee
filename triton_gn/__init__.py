"""GroupNorm for PyTorch in fused Triton kernels, forward and backward."""

from triton_gn import distributed, tiling
from triton_gn.convert import convert, unconvert
from triton_gn.explain import explain
from triton_gn.first_steps import tune, warmup
from triton_gn.functional import GroupNormStats, group_norm, group_norm_apply, group_norm_stats
from triton_gn.module import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from triton_gn.ops.settings import autocast_policy, backend, batch_invariant, plan_override
from triton_gn.report import Report

__version__ = "0.1.0"

__all__ = [
    "GroupNorm",
    "GroupNormStats",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "Report",
    "autocast_policy",
    "backend",
    "batch_invariant",
    "convert",
    "distributed",
    "explain",
    "group_norm",
    "group_norm_apply",
    "group_norm_stats",
    "plan_override",
    "tiling",
    "tune",
    "unconvert",
    "warmup",
]
