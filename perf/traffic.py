"""Count the bytes that kernels load and store, and their launches, on layers of real models.

GroupNorm and SiLU, and their backward. Kernels run in Triton's interpreter; of large layers, some
samples and groups, which every kernel here treats alike. Nothing is timed, no GPU is needed.
"""

import argparse
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.language.core import TRITON_MAX_TENSOR_NUMEL

from perf import common, evidence, evidence_figures, interpreted, peers
from perf.implementations import bytes_minimum
from perf.records import OURS
from triton_gn.ops import autograd, launcher, launches, layout
from triton_gn.ops.call import Call
from triton_gn.ops.settings import Settings
from triton_gn.plan import TARGETS, Config, plan
from triton_gn.tools import workloads
from triton_gn.tools.inspection import bytes_moved, launches_of, tracked
from triton_gn.tools.workloads import DIRECTIONS, Workload

COMMAND = "traffic"
TARGET = "sm_90"
# short name: shape and layout in perf/workloads.csv
LAYERS = {
    "SD1.5 64x64": ("2x320x64x64", "channels_last"),
    "SD1.5 16x16": ("2x1280x16x16", "channels_last"),
    "SD VAE 256x256": ("1x512x256x256", "channels_last"),
    "Flux VAE 128x128": ("1x512x128x128", "contiguous"),
    "Flux VAE 1024x1024": ("1x128x1024x1024", "contiguous"),
    "Hunyuan 9x128x128": ("1x256x9x128x128", "contiguous"),
    "LTX-2 8x45x80": ("1x512x8x45x80", "contiguous"),
    "EDM 32x32": ("64x256x32x32", "contiguous"),
    "Mask R-CNN 100x168": ("2x512x100x168", "contiguous"),
    "SegResNet 56x56x36": ("1x64x56x56x36", "contiguous"),
    "nnU-Net 64x64x64": ("2x64x64x64x64", "channels_last"),
    "Demucs 85995": ("4x6x85995", "contiguous"),
}
MOST_ELEMENTS = 2**20  # a larger layer is scaled down, but never below one program's groups


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="only layers with it; no record"
    )


def run(options: argparse.Namespace) -> int:
    """Count, print, and write the record and the figure; return the exit status.

    Raises:
        ValueError: the flags name no layer.
    """
    start = time.monotonic()
    rows = measure([name for name in LAYERS if options.match.lower() in name.lower()])
    seconds = time.monotonic() - start
    evidence.show(*tables(rows), *notes(rows))
    if not options.match:
        evidence.save(COMMAND, evidence.path_of(COMMAND), seconds, target=TARGET, rows=rows)
        evidence.show(str(evidence_figures.draw(COMMAND, evidence.load(COMMAND))))
    evidence.show(f"{seconds:.0f} s")
    return 0


def layers() -> dict[str, Workload]:
    """Return the layers by their short names, each with SiLU and parameters of x's dtype."""
    known = {
        (layer.shape_text, layer.layout): layer
        for layer in reversed(list(workloads.read(common.WORKLOADS)))
    }
    return {
        name: replace(known[key], activation="silu", fused=(), param_dtype=known[key].dtype)
        for name, key in LAYERS.items()
    }


def measure(names: list[str]) -> list[dict[str, Any]]:
    """Return a row for each layer, direction and implementation."""
    if not names:
        raise ValueError(f"--match must name layers; there are {', '.join(LAYERS)}.")
    chosen = {name: layer for name, layer in layers().items() if name in names}
    counters: dict[str, Callable[[Workload], list[dict[str, Any]]]] = {
        OURS: count_ours,
        **{peer.name: partial(count_peer, peer.name) for peer in peers.installed()},
        "torch": count_torch,
    }
    done: list[tuple[str, str, Future[list[dict[str, Any]]]]] = []
    spawn = get_context("spawn")
    with (
        interpreted.pool() as kernels,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as compilers,
    ):
        for name, layer in chosen.items():
            for implementation, count in counters.items():
                done.append((name, implementation, kernels.submit(count, layer)))
            done.append((name, "torch.compile", compilers.submit(count_inductor, layer)))
        return [
            {"layer": name, "shape": chosen[name].shape_text, "dtype": chosen[name].dtype}
            | {"layout": chosen[name].layout, "implementation": implementation}
            | row
            for name, implementation, future in tracked(done, len(done), "Counting")
            for row in future.result()
        ]


def row(
    layer: Workload, scaled: Workload, direction: str, launched: int, loaded: int, stored: int
) -> dict[str, Any]:
    """Return what was counted, over the bytes that a call has to touch."""
    share = scaled.n * scaled.groups / (layer.n * layer.groups)
    minimum = bytes_minimum(scaled, direction)
    counts = {"launches": launched, "loaded": loaded, "stored": stored, "minimum": minimum}
    ratio = round((loaded + stored) / minimum, 4)
    return {"direction": direction, "scale": share, **counts, "over_minimum": ratio}


def scale_down(layer: Workload, groups: int) -> Workload:
    """Return the layer with fewer samples and groups, these a multiple of ``groups``."""
    elements = math.prod(layer.shape)
    if elements <= MOST_ELEMENTS:
        return layer
    per_group = elements // (layer.n * layer.groups)
    kept = min(max(groups, MOST_ELEMENTS // per_group // groups * groups), layer.groups)
    return replace(layer, n=1, groups=kept, channels=layer.channels // layer.groups * kept)


def count_ours(layer: Workload) -> list[dict[str, Any]]:
    """Count the kernels of the plans that the whole layer takes on an H100."""
    rows = []
    for direction in DIRECTIONS:
        config = plan(layer.problem(direction), TARGETS[TARGET])
        scaled = scale_down(layer, config.tile.groups)
        launch = _prepared(scaled, direction, config)
        with interpreted.Traffic() as traffic:
            launch()
        problem = scaled.problem(direction)
        stated = bytes_moved(launches_of(scaled, problem, config)[1], problem, config)
        counts = traffic.launches, traffic.loaded, traffic.stored
        extra = {"strategy": config.strategy, "stated": stated}
        rows.append(row(layer, scaled, direction, *counts) | extra)
    return rows


def stated_over_minimum(layer: Workload, direction: str) -> float:
    """Return what inspect states for the whole layer, over the minimum."""
    problem = layer.problem(direction)
    config = plan(problem, TARGETS[TARGET])
    moved = bytes_moved(launches_of(layer, problem, config)[1], problem, config)
    return moved / bytes_minimum(layer, direction)


def _prepared(layer: Workload, direction: str, config: Config) -> Callable[[], object]:
    """Return a function that launches the kernels of a plan."""
    operands = layer.operands("cpu")
    call = Call(layer.groups, peers.EPS, layer.activation, operands.x.dtype, Settings())
    stats = launches.statistics(operands.x, layer.n, layer.groups, 3).zero_()
    if direction == "forward":
        y = layout.empty_like(operands.x)
        return lambda: launcher.forward(operands, call, y, stats, config=config)
    grads = autograd.empty_gradients(operands, [t is not None for t in operands])
    dy = layout.empty_like(operands.x).zero_()
    return lambda: launcher.backward(operands, call, dy, stats, grads, config=config)


def _operands(layer: Workload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = (t for t in layer.operands("cpu")[:3] if t is not None)
    return x, weight, bias, layout.empty_like(x).zero_()


def count_peer(name: str, layer: Workload) -> list[dict[str, Any]]:
    """Count a peer's kernels, PyTorch's SiLU around them, and copies to contiguous tensors."""
    (peer,) = (peer for peer in peers.PEERS if peer.name == name)
    n, channels, *spatial = layer.shape
    if peer.tile(n, channels, math.prod(spatial), layer.groups) > TRITON_MAX_TENSOR_NUMEL:
        return []
    scaled = scale_down(layer, 1)
    x, weight, bias, dy = _operands(scaled)
    with interpreted.Traffic() as forward:
        flat = x.contiguous().reshape(*x.shape[:2], -1)
        z, saved = peer.forward(flat, scaled.groups, weight, bias)
        F.silu(z)
    with interpreted.Traffic() as backward:
        flat = dy.contiguous().reshape(*x.shape[:2], -1)
        peer.backward(torch.ops.aten.silu_backward(flat, z), saved)
    return _both(layer, scaled, forward, backward)


def count_torch(layer: Workload) -> list[dict[str, Any]]:
    """Count the passes of PyTorch's CUDA kernels, which read contiguous tensors, and of SiLU."""
    scaled = scale_down(layer, 1)
    x, weight, bias, dy = _operands(scaled)
    sizes = *x.shape[:2], math.prod(x.shape[2:]), scaled.groups
    aten = torch.ops.aten
    with interpreted.Traffic() as forward:
        x = x.contiguous()
        z, mean, rstd = aten.native_group_norm(x, weight, bias, *sizes, peers.EPS)
        F.silu(z)
    with interpreted.Traffic() as backward:
        dz = aten.silu_backward(dy.contiguous(), z)
        aten.native_group_norm_backward(dz, x, mean, rstd, weight, *sizes, [True] * 3)
    return _both(layer, scaled, forward, backward)


def _both(layer: Workload, scaled: Workload, *counted: interpreted.Traffic) -> list[dict[str, Any]]:
    return [
        row(layer, scaled, direction, traffic.launches, traffic.loaded, traffic.stored)
        for direction, traffic in zip(DIRECTIONS, counted, strict=True)
    ]


def count_inductor(layer: Workload) -> list[dict[str, Any]]:
    """Count what Inductor generates for the whole layer."""
    from perf import inductor

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # as PyTorch's group_norm does on CUDA
        return F.silu(F.group_norm(x.contiguous(), layer.groups, weight, bias, peers.EPS))

    operands = [t for t in layer.operands("meta") if t is not None]
    return [
        row(layer, layer, direction, len(code.kernels), code.loaded, code.stored)
        for direction, code in zip(DIRECTIONS, inductor.generate(function, operands), strict=True)
    ]


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """Return a table for each direction: bytes over the minimum, and launches."""
    made = []
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for direction in DIRECTIONS:
        here = [row for row in rows if row["direction"] == direction]
        cells = []
        for layer, by_name in evidence.grouped(here, lambda row: row["layer"]).items():
            ours = by_name[OURS]
            mark = " CL" if ours["layout"] == "channels_last" else ""
            counts = [cell(by_name[name]) if name in by_name else "-" for name in names]
            stated = f"{ours['stated'] / ours['minimum']:.2f}"
            scale = f"{100 * ours['scale']:.2g} %" if ours["scale"] < 1 else "whole"
            cells.append([layer, ours["shape"] + mark, ours["strategy"], scale, *counts, stated])
        title = f"Bytes over the minimum (launches), {direction} of GroupNorm and SiLU"
        left = ["layer", "shape", "strategy", "counted"]
        made.append(evidence.table(title, left, [*names, "inspect"], cells))
    return made


def markdown(record: dict[str, Any]) -> str:
    """Return a table of bytes over the minimum and launches: means over the layers."""
    names = list(dict.fromkeys(row["implementation"] for row in record["rows"]))
    lines = [f"| | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for direction in DIRECTIONS:
        cells = []
        for name in names:
            mean = evidence_figures.mean_over_minimum(record, name, direction)
            counts = [
                row["launches"]
                for row in record["rows"]
                if (row["implementation"], row["direction"]) == (name, direction)
            ]
            cells.append(f"{mean:.2f} ({min(counts)} to {max(counts)})")
        lines.append(f"| {direction} | {' | '.join(cells)} |")
    return "\n".join(lines)


def findings(record: dict[str, Any]) -> list[str]:
    """Return what the documentation says of the record besides its table."""
    rows = record["rows"]
    ours = [row for row in rows if row["implementation"] == OURS]
    split = {row["layer"] for row in ours if row["strategy"] == "split"}
    worst = max(ours, key=lambda row: row["over_minimum"])
    generated = [row for row in rows if row["implementation"] == "torch.compile"]
    wide = [row for row in generated if row["stored"] > 2.5 * x_bytes(row)]
    unable = {row["layer"] for row in rows} - {
        row["layer"] for row in rows if row["implementation"] == "flag_gems"
    }
    return [
        f"within {100 * max(abs(excess(row)) for row in ours):.1f} % of what `inspect` states",
        f"but split ones, {len(split)} of these {len(LAYERS)} layers, read x twice",
        f"at most {worst['over_minimum']:.2f}, of {worst['layer']} {worst['direction']}",
        f"In {len(wide)} of the {len(LAYERS)} backwards it writes a float32 tensor of x's size",
        f"FlagGems cannot run {len(unable)} of the layers",
    ]


def x_bytes(row: dict[str, Any]) -> int:
    """Return the bytes of the whole layer's x."""
    elements = math.prod(workloads.parse_shape(row["shape"]))
    return elements * workloads.DTYPES[row["dtype"]].itemsize


def cell(row: dict[str, Any]) -> str:
    """Return a row's bytes over the minimum and its launches as text."""
    return f"{row['over_minimum']:.2f} ({row['launches']})"


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return sentences on how exact the count is, and how the table came about."""
    ours = [row for row in rows if row["implementation"] == OURS]
    worst = max(ours, key=lambda row: abs(excess(row)))
    return [
        f"counted over what inspect states: at most {100 * excess(worst):+.2f} %, "
        f"{worst['layer']} {worst['direction']}",
        f"-: it cannot run, since a program's tile has more than {TRITON_MAX_TENSOR_NUMEL:,} "
        "elements, the most that Triton takes",
        "CL: channels-last. triton_gn reads it as it is; the others copy x and dy first.",
        "torch: passes of its CUDA kernels, read in ATen/native/cuda/group_norm_kernel.cu.",
        "torch.compile: generated for an H100 from fake tensors; each tl.load and tl.store in the "
        "code counts its tensor once.",
        peers.how_to_install(),
    ]


def excess(row: dict[str, Any]) -> float:
    """Return by how much the count exceeds what inspect states, as a share."""
    excess: float = (row["loaded"] + row["stored"]) / row["stated"] - 1
    return excess
