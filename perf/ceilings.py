"""Measure what the GPU can do at all: the speed of a copy and an addition by size, and how much L2
holds of what was just touched."""

import argparse
from collections.abc import Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from perf import bench
from perf.providers import floor
from perf.records import DIRECTIONS, REFERENCES, Record, folder_of, save
from triton_gn.ops.device import gpu_of
from triton_gn.tools import stopwatch

_SMALLEST = 2**20  # bytes
_IN_L2 = 1.25  # times as fast as the largest copy from DRAM: most of it came from L2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--largest", type=int, default=2**30, metavar="BYTES", help="(1 GiB)")
    bench.add_out(parser)


def run(options: argparse.Namespace, device: torch.device | None = None) -> int:
    """Measure, write the records anew and print them; return the exit status."""
    device = device or bench.current_gpu("python -m perf bench --predict sm_90")
    gpu = gpu_of(device)
    sizes = _sizes(options.largest)
    found = [
        record
        for direction in DIRECTIONS[: len(REFERENCES)]
        for cold in (True, False)
        for record in _records(direction, sizes, device, cold)
    ]
    path = (options.out or folder_of(gpu.name, measured=True)) / "ceilings.jsonl"
    save(path, found, anew=True)
    report(found)
    print(f"{len(found)} records in {path}")
    return 0


def _sizes(largest: int) -> list[int]:
    """Bytes from 1 MiB on, two steps to a doubling: L2's end lies between powers of two."""
    sizes = [_SMALLEST]
    while (size := sizes[-2] * 2 if len(sizes) > 1 else _SMALLEST * 3 // 2) <= largest:
        sizes.append(size)
    return sizes


def _records(
    direction: str, sizes: Sequence[int], device: torch.device, cold: bool
) -> list[Record]:
    calls = [floor(direction, size, device) for size in sizes]
    times = stopwatch.measure(calls, device, cold=cold)
    base = bench.origin("ceilings", gpu_of(device), measured=True)
    return [
        Record(
            **base,
            **bench.fields_of_times(one, cold),
            workload="ceiling",
            shape=f"1x{size // 4}",
            groups=1,
            dtype="float32",
            param_dtype="float32",
            layout="contiguous",
            activation="none",
            direction=direction,
            provider=REFERENCES[direction],
            cache="cold" if cold else "warm",
            bytes_minimum=size,
            date=bench.now(),
        )
        for size, one in zip(sizes, times, strict=True)
    ]


def effective_l2(found: Sequence[Record]) -> int:
    """The most bytes of a warm copy that still comes from L2 for the most part; 0 if none does."""
    copies = [one for one in found if one.provider == REFERENCES["forward"]]
    dram = max((one for one in copies if one.cache == "cold"), key=lambda one: one.bytes_minimum)
    fast = _IN_L2 * (dram.gb_per_s or 0)
    held = (one.bytes_minimum for one in copies if one.cache == "warm" and _speed(one) >= fast)
    return max(held, default=0)


def _speed(record: Record) -> float:
    return record.gb_per_s or 0


def report(found: Sequence[Record]) -> None:
    """Print the speeds by size, and what L2 holds."""
    kinds = list(dict.fromkeys((one.provider, one.cache) for one in found))
    table = Table(title=f"{found[0].device}: GB/s", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("MiB moved", justify="right")
    for provider, cache in kinds:
        table.add_column(f"{provider}, {cache} L2", justify="right")
    speeds = {(one.provider, one.cache, one.bytes_minimum): _speed(one) for one in found}
    for size in sorted({one.bytes_minimum for one in found}):
        row = (f"{speeds[*kind, size]:.0f}" for kind in kinds)
        table.add_row(f"{size / 2**20:g}", *row)
    Console().print(table)
    print(f"Effective L2: {effective_l2(found) / 2**20:g} MiB read and written")
