"""Time the CPU path beside the operations of PyTorch that it replaces, as ratios within one run.

Each call is GroupNorm and SiLU: ``triton_gn.group_norm(..., activation="silu")`` over
``F.silu(F.group_norm(...))``. Both take turns and the fastest of all rounds counts, since other
work on the machine only adds time.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import triton_gn


class Layer(NamedTuple):
    """A layer of a real model, of some milliseconds: small ones show what the checks of each call
    cost (docs/measured.md)."""

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
LAYOUTS = ("contiguous", "channels_last")
GOAL = 1.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
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
        table = Table("layer", "layout", box=SIMPLE_HEAD, show_edge=False)
        table.title = f"forward / and backward, over PyTorch, {threads} thread{'s'[: threads > 1]}"
        for dtype in DTYPES:
            table.add_column(str(dtype).removeprefix("torch."), justify="right", no_wrap=True)
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
    """Let glibc keep what is freed: new pages take as long as a layer, and not each call gets
    some."""
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        library.mallopt(-4, 0)  # M_MMAP_MAX


def ratio_of(layer: Layer, layout: str, dtype: torch.dtype, backward: int, seconds: float) -> float:
    """The time of triton_gn's call over the time of PyTorch's two."""
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
    mine, pytorchs = fastest(calls, seconds)
    if mine > GOAL * pytorchs:  # for longer, which takes noise out of both
        mine, pytorchs = map(min, (mine, pytorchs), fastest(calls, 5 * seconds))
    return mine / pytorchs


def laid(x: Tensor, layout: str) -> Tensor:
    """x, or a copy with channels innermost."""
    return x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def fastest(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Seconds of each call in its fastest round, of at least 20."""
    best = [float("inf")] * len(calls)
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < 20 or time.perf_counter() < end:
        rounds += 1
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best
