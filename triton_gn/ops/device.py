"""Describe a GPU to the planner."""

import functools
from dataclasses import replace

import torch

from triton_gn.plan import TARGETS, Device


def _nearest(name: str) -> str:
    """Return the vendor's newest known target that is not newer than ``name``, else its oldest."""

    def version(target: str) -> int:
        return int(target.lstrip("smgfx_"), 16)

    targets = sorted((target for target in TARGETS if target[:2] == name[:2]), key=version)
    return [targets[0], *(target for target in targets if version(target) <= version(name))][-1]


def target_of(device: torch.device) -> str:
    """Return what the compiler calls a GPU: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def gpu_of(device: torch.device) -> Device:
    """Return the planner's description of a GPU; an H100 stands for a device that is not one."""
    if device.type != "cuda":
        return TARGETS["sm_90"]
    properties, name = torch.cuda.get_device_properties(device), target_of(device)
    known = TARGETS[_nearest(name)]
    dram_gb_per_s = known.dram_gb_per_s
    if name not in TARGETS:
        dram_gb_per_s = dram_gb_per_s * properties.multi_processor_count // known.multiprocessors
    return replace(
        known,
        name=properties.name,
        dram_gb_per_s=dram_gb_per_s,
        multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        warp_size=properties.warp_size,
    )
