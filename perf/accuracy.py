"""Measure the errors of GroupNorm and of its gradients against float64, in several packages.

PyTorch runs on the CPU and, where there is one, on the GPU. The kernels of triton_gn and of its
peers run in Triton's interpreter: IEEE arithmetic, without the fused multiply-adds of a GPU.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import triton_gn
from perf import evidence, evidence_figures, interpreted, peers
from perf.records import OURS
from triton_gn import reference
from triton_gn.reference import Operands
from triton_gn.tools.inspection import tracked
from triton_gn.tools.workloads import DTYPES, LAYOUTS

COMMAND = "accuracy"
RESULTS = ("y", "dx", "dweight", "dbias")
GROUPS = 2
SHAPE = 2, 16, 16, 32  # 4,096 elements a group
STD = 0.5
RATIOS = tuple(10 ** (step / 2) for step in range(13))  # |mean| / std, 1 to 1e6
SIZES = tuple(2**bits for bits in range(8, 19, 2))  # elements of a group
RATIO_OF_SIZES = 1e2
TEN_CHANNELS = 2, 20, 16, 32  # a group: no power of two
DTYPE_NAMES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no flags."""


def run(options: argparse.Namespace) -> int:
    """Measure, print, and write the record and the figure; return the exit status."""
    start = time.monotonic()
    rows = measure()
    seconds = time.monotonic() - start
    evidence.save(COMMAND, evidence.path_of(COMMAND), seconds, std=STD, rows=rows)
    evidence.show(*tables(rows), peers.how_to_install())
    evidence.show(str(evidence_figures.draw(COMMAND, evidence.load(COMMAND))))
    evidence.show(f"{seconds:.0f} s")
    return 0


def measure() -> list[dict[str, Any]]:
    """Return a row for each case and implementation."""
    cases = [
        *product(["mean"], [SHAPE], RATIOS, DTYPE_NAMES, LAYOUTS),
        *product(["channels"], [TEN_CHANNELS], [1.0], ["float32"], LAYOUTS),
        *product(["size"], map(_shape, SIZES), [RATIO_OF_SIZES], DTYPE_NAMES, LAYOUTS),
    ]
    with interpreted.pool() as pool:
        rows = tracked(pool.map(rows_of, cases), len(cases), "Measuring")
        return [row for several in rows for row in several]


def _shape(size: int) -> tuple[int, ...]:
    """Return the shape of one sample of two groups of a size, which has 8 channels each."""
    height = 2 ** ((size.bit_length() - 4) // 2)
    return 1, 8 * GROUPS, height, size // 8 // height


def rows_of(case: tuple[str, tuple[int, ...], float, str, str]) -> list[dict[str, Any]]:
    """Return the errors of every implementation for one case."""
    over, shape, ratio, dtype, layout = case
    operands = operands_of(shape, ratio, DTYPES[dtype], layout)
    expected = step(float64, [t.double().contiguous() for t in operands])
    fields = {"over": over, "group": torch.Size(shape).numel() // shape[0] // GROUPS}
    fields |= {"ratio": ratio, "dtype": dtype, "layout": layout}
    return [
        fields | {"implementation": name} | errors(compute(operands), expected)
        for name, compute in implementations().items()
    ]


def operands_of(
    shape: Sequence[int], ratio: float, dtype: torch.dtype, layout: str
) -> list[Tensor]:
    """Return x, weight, bias and dy: x is normal, ``ratio`` standard deviations away from 0."""
    random = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=random, dtype=torch.float64)
    x, dy = STD * (draw(*shape) + ratio), draw(*shape)
    if layout == "channels_last":
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    weight, bias = 1 + 0.25 * draw(shape[1]), 0.25 * draw(shape[1])
    return [t.to(dtype) for t in (x, weight, bias, dy)]


def float64(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute the formulas in float64."""
    return reference.group_norm(Operands(x, weight, bias), groups, eps, "none")


def step(group_norm: Callable[..., Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
    """Return y, dx, dweight and dbias."""
    x, weight, bias, dy = operands
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = group_norm(leaves[0], GROUPS, *leaves[1:], peers.EPS)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def ours(operands: Sequence[Tensor]) -> list[Tensor]:
    """Compute with triton_gn's kernels."""
    with triton_gn.backend("triton"):
        return step(triton_gn.group_norm, operands)


def torch_on(device: str, operands: Sequence[Tensor]) -> list[Tensor]:
    """Compute with PyTorch's kernels on a device."""
    return step(F.group_norm, [t.to(device) for t in operands])


def of_peer(peer: peers.Peer, operands: Sequence[Tensor]) -> list[Tensor]:
    """Compute with a peer's kernels, on contiguous tensors of three dimensions."""
    x, weight, bias, dy = operands
    flat, dflat = (t.reshape(*t.shape[:2], -1).contiguous() for t in (x, dy))
    y, saved = peer.forward(flat, GROUPS, weight, bias)
    dx, dweight, dbias = peer.backward(dflat, saved)
    return [y.reshape(x.shape), dx.reshape(x.shape), dweight, dbias]


def implementations() -> dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]:
    """Return the implementations that can run here, by name."""
    found: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]
    found = {OURS: ours, "torch, CPU": partial(torch_on, "cpu")}
    if torch.cuda.is_available():
        found["torch, CUDA"] = partial(torch_on, "cuda")
    return found | {peer.name: partial(of_peer, peer) for peer in peers.installed()}


def errors(results: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float | None]:
    """Return each result's largest error over its largest value; None if that is no number.

    A result that must be all 0, as dweight of a constant x, has its error itself.
    """
    found: dict[str, float | None] = {}
    for name, result, exact in zip(RESULTS, results, expected, strict=True):
        error = float((result.cpu().double() - exact).abs().max())
        scale = float(exact.abs().max()) or 1.0
        found[name] = error / scale if math.isfinite(error) else None
    return found


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """Return a table of errors over the mean and one over the size of a group."""
    made = []
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for over, field, title in (
        ("mean", "ratio", "Largest error of y, and of dx, dweight and dbias, over |mean| / std"),
        ("channels", "group", "The same for groups of 10 channels"),
        ("size", "group", f"The same over the size of a group, |mean| / std = {RATIO_OF_SIZES:g}"),
    ):
        here = [row for row in rows if row["over"] == over]
        cells = [
            [dtype, layout, f"{value:.3g}", *(cell(by_name[name]) for name in names)]
            for (dtype, layout, value), by_name in evidence.grouped(
                here, itemgetter("dtype", "layout", field)
            ).items()
        ]
        made.append(evidence.table(title, ["dtype", "layout"], [field, *names], cells))
    return made


def markdown(record: dict[str, Any]) -> str:
    """Return a table of the errors of float32: y, and the largest of the gradients."""
    wanted = [1.0, 1e2, 1e4, 1e6]
    rows = [
        row
        for row in record["rows"]
        if (row["over"], row["dtype"]) == ("mean", "float32") and row["ratio"] in wanted
    ]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = [
        f"| \\|mean\\| / std, layout | {' | '.join(names)} |",
        "| --- " * (1 + len(names)) + "|",
    ]
    for (ratio, layout), by_name in evidence.grouped(rows, itemgetter("ratio", "layout")).items():
        cells = [f"{ratio:,.0f}, {layout.replace('_', '-')}", *map(cell, by_name.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def findings(record: dict[str, Any]) -> list[str]:
    """Return what the documentation says of the record besides its table."""
    errors_of_y = {
        row["implementation"]: row["y"]
        for row in record["rows"]
        if (row["over"], row["layout"]) == ("channels", "contiguous")
    }
    return [f"y of {name} is off by {error:.0e}" for name, error in errors_of_y.items()]


def cell(row: dict[str, Any]) -> str:
    """Return the error of y and the largest of the gradients as text."""
    y, *gradients = (math.nan if row[name] is None else row[name] for name in RESULTS)
    largest = math.nan if any(map(math.isnan, gradients)) else max(gradients)
    return f"{y:.0e} {largest:.0e}"
