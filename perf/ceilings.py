"""Measure the speed of copies and additions by size, and how much of the last pass L2 holds."""

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console

from perf import common
from perf.implementations import speed_of_light
from perf.records import DIRECTIONS, REFERENCES, Record, folder_of, save
from triton_gn.ops.device import gpu_of
from triton_gn.tools import stopwatch
from triton_gn.tools.workloads import Workload

_SMALLEST = 2**20  # bytes
_IN_L2 = 1.25  # speed over the largest copy from DRAM: above it, most bytes came from L2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--largest", type=int, default=2**30, metavar="BYTES", help="(1 GiB)")
    common.add_out(parser)


def run(options: argparse.Namespace, device: torch.device | None = None) -> int:
    """Measure, write the records anew and print them; return the exit status."""
    device = device or common.current_gpu("python -m perf bench --predict sm_90")
    gpu = gpu_of(device)
    sizes = _sizes(options.largest)
    rows = [
        record
        for direction in DIRECTIONS[: len(REFERENCES)]
        for cold in (True, False)
        for record in _records(direction, sizes, device, cold)
    ]
    path = (options.out or folder_of(gpu.name, measured=True)) / "ceilings.jsonl"
    save(path, rows, anew=True)
    report(rows)
    print(f"{len(rows)} records in {path}")
    return 0


def _sizes(largest: int) -> list[int]:
    """Return bytes from 1 MiB on, two sizes to a doubling: L2's end lies between powers of two."""
    sizes = [_SMALLEST]
    while (size := sizes[-2] * 2 if len(sizes) > 1 else _SMALLEST * 3 // 2) <= largest:
        sizes.append(size)
    return sizes


def _records(
    direction: str, sizes: Sequence[int], device: torch.device, cold: bool
) -> list[Record]:
    calls = [speed_of_light(direction, size, device) for size in sizes]
    times = stopwatch.measure(calls, device, cold=cold)
    base = common.origin("ceilings", gpu_of(device), measured=True)
    return [
        Record(
            **base,
            **common.fields_of_times(time, cold),
            **common.fields_of_workload(Workload("ceiling", 1, size // 4, 1, (), "float32")),
            direction=direction,
            implementation=REFERENCES[direction],
            cache="cold" if cold else "warm",
            bytes_minimum=size,
            date=common.now(),
        )
        for size, time in zip(sizes, times, strict=True)
    ]


def effective_l2(rows: Sequence[Record]) -> int:
    """Return the most bytes of a warm copy that still comes mostly from L2; 0 if none does."""
    copies = [row for row in rows if row.implementation == REFERENCES["forward"]]
    dram = max((row for row in copies if row.cache == "cold"), key=lambda row: row.bytes_minimum)
    fast = _IN_L2 * (dram.gb_per_s or 0)
    held = (row.bytes_minimum for row in copies if row.cache == "warm" and _speed(row) >= fast)
    return max(held, default=0)


def _speed(record: Record) -> float:
    return record.gb_per_s or 0


def report(rows: Sequence[Record]) -> None:
    """Print the speeds by size, and how much L2 holds."""
    kinds = list(dict.fromkeys((row.implementation, row.cache) for row in rows))
    titles = ["MiB moved", *(f"{name}, {cache} L2" for name, cache in kinds)]
    table = common.table([], titles, title=f"{rows[0].device}: GB/s")
    speeds = {(row.implementation, row.cache, row.bytes_minimum): _speed(row) for row in rows}
    for size in sorted({row.bytes_minimum for row in rows}):
        row = (f"{speeds[*kind, size]:.0f}" for kind in kinds)
        table.add_row(f"{size / 2**20:g}", *row)
    Console().print(table)
    print(f"Effective L2: {effective_l2(rows) / 2**20:g} MiB read and written")
