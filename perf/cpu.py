"""Time the CPU path beside the operations of PyTorch that it replaces, as ratios within one run.

Each ratio is ``triton_gn.group_norm(..., activation="silu")`` over ``F.silu(F.group_norm(...))``.
The calls take turns, and the fastest round counts: other work on the machine only adds time.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from perf import common
from perf.implementations import Call, ours, torchs, unfused
from triton_gn.tools.workloads import LAYOUTS, Workload

# layers of real models that take some milliseconds: small ones would show the cost of the checks of
# a call instead (docs/measured.md)
LAYERS = (
    Workload("SD1.5 64x64", 4, 320, 32, (64, 64), activation="silu"),
    Workload("SD1.5 32x32", 8, 640, 32, (32, 32), activation="silu"),
    Workload("SD VAE 256x256", 1, 128, 32, (256, 256), activation="silu"),
    Workload("ResNet 28x28", 32, 128, 32, (28, 28), activation="silu"),
    Workload("ResNet 14x14", 64, 256, 32, (14, 14), activation="silu"),
    Workload("video 17x32x32", 1, 256, 32, (17, 32, 32), activation="silu"),
    Workload("medical 64x64x64", 1, 32, 8, (64, 64, 64), activation="silu"),
    Workload("audio 8192", 4, 256, 32, (8192,), activation="silu"),
)
DTYPES = ("float32", "bfloat16", "float16")
GOAL = 1.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--seconds", type=float, default=0.4, metavar="S", help="for each pair of calls"
    )


def run(options: argparse.Namespace) -> int:
    """Print a table for one thread and one for all; return the exit status."""
    _keep_memory()
    all_threads = torch.get_num_threads()
    ratios: list[float] = []
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        title = f"forward / and backward, over PyTorch, {threads} thread{'s'[: threads > 1]}"
        table = common.table(["layer", "layout"], DTYPES, title=title)
        for layer in LAYERS:
            for layout in LAYOUTS:
                cells = []
                for dtype in DTYPES:
                    workload = replace(layer, dtype=dtype, param_dtype=dtype, layout=layout)
                    pair = [ratio_of(workload, d, options.seconds) for d in ("forward", "both")]
                    cells.append(f"{pair[0]:.2f} / {pair[1]:.2f}")
                    ratios += pair
                table.add_row(layer.name, layout.replace("_", "-"), *cells)
        Console().print(table)
        print()
    torch.set_num_threads(all_threads)
    above = sum(ratio > GOAL for ratio in ratios)
    print(f"{len(ratios)} ratios, the largest {max(ratios):.2f}; {above} above {GOAL}.")
    return 0


def _keep_memory() -> None:
    """Let glibc keep freed memory: new pages take as long as a layer, and only some calls get
    them."""
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        library.mallopt(-4, 0)  # M_MMAP_MAX


def ratio_of(workload: Workload, direction: str, seconds: float) -> float:
    """Return the time of triton_gn's call over that of PyTorch's two."""
    operands = workload.operands("cpu")
    dy = torch.randn_like(operands.x)
    computes = ours(workload), unfused(torchs, workload)
    calls = [Call(compute, operands, dy, direction) for compute in computes]
    best = fastest(calls, seconds)
    if best[0] > GOAL * best[1]:  # a longer run takes noise out of both
        best = list(map(min, best, fastest(calls, 5 * seconds)))
    return best[0] / best[1]


def fastest(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Return the seconds of each call in its fastest round, of at least 20."""
    best = [float("inf")] * len(calls)
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < 20 or time.perf_counter() < end:
        rounds += 1
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
