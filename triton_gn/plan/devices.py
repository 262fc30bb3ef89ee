"""Nominal figures of GPUs, to plan for one that need not be present."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Nominal figures of a GPU; the default is an H100 SXM."""

    name: str = "NVIDIA H100 80GB HBM3"
    multiprocessors: int = 132
    l2_bytes: int = 50 * 2**20
    warp_size: int = 32
    dram_gb_per_s: int = 3352
    # per multiprocessor
    registers: int = 65536
    shared_bytes: int = 228 * 1024
    max_warps: int = 64
    max_ctas: int = 32
    lanes: int = 128  # threads that execute an instruction per clock
    clock_mhz: int = 1980


def _amd(
    name: str, multiprocessors: int, l2_bytes: int, dram_gb_per_s: int, lanes: int, clock_mhz: int
) -> Device:
    return Device(
        name, multiprocessors, l2_bytes, 64, dram_gb_per_s, 131072, 65536, 32, 32, lanes, clock_mhz
    )


# one GPU for each target that Triton compiles for
TARGETS = {
    "sm_75": Device("NVIDIA T4", 40, 4 * 2**20, 32, 320, 65536, 64 * 1024, 32, 16, 64, 1590),
    "sm_80": Device(
        "NVIDIA A100-SXM4-80GB", 108, 40 * 2**20, 32, 2039, 65536, 164 * 1024, 64, 32, 64, 1410
    ),
    "sm_86": Device("NVIDIA A10", 72, 6 * 2**20, 32, 600, 65536, 100 * 1024, 48, 16, 128, 1695),
    "sm_89": Device(
        "NVIDIA GeForce RTX 4090", 128, 72 * 2**20, 32, 1008, 65536, 100 * 1024, 48, 24,
        clock_mhz=2520,
    ),
    "sm_90": Device(),
    "sm_100": Device(
        "NVIDIA B200", 148, 126 * 2**20, 32, 8000, 65536, 228 * 1024, 64, 32, clock_mhz=1965
    ),
    "sm_120": Device(
        "NVIDIA GeForce RTX 5090", 170, 96 * 2**20, 32, 1792, 65536, 100 * 1024, 48, 24,
        clock_mhz=2407,
    ),
    "gfx90a": _amd("AMD Instinct MI250X", 110, 8 * 2**20, 1638, 64, 1700),
    "gfx942": _amd("AMD Instinct MI300X", 304, 4 * 2**20, 5300, 128, 2100),
    "gfx950": _amd("AMD Instinct MI355X", 256, 4 * 2**20, 8000, 128, 2400),
}  # fmt: skip
