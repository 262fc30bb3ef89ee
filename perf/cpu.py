"""Time the CPU path beside the operations of PyTorch that it replaces, as ratios within one run.

Each ratio is ``triton_gn.group_norm(..., activation="silu")`` over ``F.silu(F.group_norm(...))``.
The calls take turns, and the fastest round counts: other work on the machine only adds time.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import triton_gn
from perf import common
from triton_gn.tools.workloads import LAYOUTS


class Layer(NamedTuple):
    """A layer of a real model that takes some milliseconds.

    Small layers would show the cost of the checks of a call instead (docs/measured.md).
    """

    name: str
    shape: tuple[int, ...]
    groups: int = 32


LAYERS = (
    Layer("SD1.5 64x64", (4, 320, 64, 64)),
    Layer("SD1.5 32x32", (8, 640, 32, 32)),
    Layer("SD VAE 256x256", (1, 128, 256, 256)),
    Layer("ResNet 28x28", (32, 128, 28, 28)),
    Layer("ResNet 14x14", (64, 256, 14, 14)),
    Layer("video 17x32x32", (1, 256, 17, 32, 32)),
    Layer("medical 64x64x64", (1, 32, 64, 64, 64), 8),
    Layer("audio 8192", (4, 256, 8192)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
        dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        table = common.table(["layer", "layout"], dtypes, title=title)
        for layer in LAYERS:
            for layout in LAYOUTS:
                cells = []
                for dtype in DTYPES:
                    pair = [ratio_of(layer, layout, dtype, b, options.seconds) for b in (0, 1)]
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
    """Let glibc keep freed memory: new pages take as long as a layer, and not every call gets new
    ones."""
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        library.mallopt(-4, 0)  # M_MMAP_MAX


def ratio_of(layer: Layer, layout: str, dtype: torch.dtype, backward: int, seconds: float) -> float:
    """Return the time of triton_gn's call over that of PyTorch's two."""
    x, dy = (laid(torch.randn(layer.shape, dtype=dtype), layout) for _ in range(2))
    weight, bias = torch.randn(2, layer.shape[1], dtype=dtype)
    if backward:
        x, weight, bias = (t.requires_grad_() for t in (x, weight.clone(), bias.clone()))

    def ours() -> Tensor:
        return triton_gn.group_norm(x, layer.groups, weight, bias, activation="silu")

    def theirs() -> Tensor:
        return F.silu(F.group_norm(x, layer.groups, weight, bias))

    def and_backward(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), (x, weight, bias), dy)

    calls = [and_backward(ours), and_backward(theirs)] if backward else [ours, theirs]
    best = fastest(calls, seconds)
    if best[0] > GOAL * best[1]:  # a longer run takes noise out of both
        best = list(map(min, best, fastest(calls, 5 * seconds)))
    return best[0] / best[1]


def laid(x: Tensor, layout: str) -> Tensor:
    """Return x, or a copy with channels innermost."""
    return x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


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
