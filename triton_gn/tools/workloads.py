"""Workloads: one GroupNorm layer each, named on a command line or in a file of real models."""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_gn import activations
from triton_gn.ops import launches
from triton_gn.plan import Problem
from triton_gn.reference import Operands

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
LAYOUTS = ("contiguous", "channels_last")
DIRECTIONS = ("forward", "backward")
FUSED = ("scale", "shift", "pre_add", "residual")
# operands that the values of a CSV column stand for
_SCALE_SHIFT = {"": (), "per_channel": ("scale", "shift"), "per_element": ()}
_RESIDUAL = {"": (), "after": ("residual",), "before_per_channel": ("pre_add",)}


@dataclass(frozen=True)
class Workload:
    """One GroupNorm layer and its fused operands.

    ``spatial`` excludes n and channels; channels_last means channels innermost in any rank.
    ``core`` marks the small set of workloads that covers every regime.

    Raises:
        ValueError: there is no such problem.
    """

    name: str
    n: int
    channels: int
    groups: int
    spatial: tuple[int, ...]
    dtype: str = "bfloat16"
    param_dtype: str = ""  # default: the input's
    layout: str = "contiguous"
    activation: str = "none"
    fused: tuple[str, ...] = ()
    core: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "param_dtype", self.param_dtype or self.dtype)
        if min(self.shape) < 1:
            raise ValueError(f"sizes must be at least 1; got {self.shape_text}.")
        if self.groups < 1 or self.channels % self.groups:
            raise ValueError(
                f"{self.channels} channels cannot be split into {self.groups} groups; "
                "the groups must divide the channels."
            )
        for what, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("parameters' dtype", self.param_dtype, DTYPES),
            ("layout", self.layout, LAYOUTS),
            *(("fused operand", name, FUSED) for name in self.fused),
        ):
            if value not in allowed:
                raise ValueError(f"the {what} must be one of {', '.join(allowed)}; got {value!r}.")
        if activations.lookup(self.activation) is None:
            raise ValueError(
                f"the activation must be one of {activations.NAMES}; got {self.activation!r}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input: (n, channels, *spatial)."""
        return self.n, self.channels, *self.spatial

    @property
    def shape_text(self) -> str:
        """Shape as ``parse_shape`` reads it: "2x320x64x64"."""
        return "x".join(map(str, self.shape))

    def problem(self, direction: str) -> Problem:
        """Return the problem of its forward or backward launches."""
        operands = self.kernel_operands(self.operands("meta"), direction)
        return launches.problem_of(direction, operands, self.groups, self.activation)

    def kernel_operands(self, operands: Operands, direction: str) -> Operands:
        """Return the operands that the kernels of a direction take.

        Without an activation the residual's gradient is dy: the backward kernels take no residual.
        """
        takes_residual = direction == "forward" or self.activation != "none"
        return operands if takes_residual else operands._replace(residual=None)

    def operands(self, device: str | torch.device, seed: int = 0) -> Operands:
        """Return random operands on a device; on "meta" they have shapes only.

        Weight is around 1, bias around 0, all others are standard normal.
        """
        dtype, param_dtype = DTYPES[self.dtype], DTYPES[self.param_dtype]
        generator = None
        if torch.device(device).type != "meta":
            generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        def activation() -> Tensor:
            if self.layout == "contiguous":
                return normal(*self.shape, dtype=dtype)
            n, channels, *spatial = self.shape
            return normal(n, *spatial, channels, dtype=dtype).movedim(-1, 1)

        per_sample = {
            name: normal(self.n, self.channels, dtype=param_dtype)
            for name in self.fused
            if name != "residual"
        }
        return Operands(
            activation(),
            1 + 0.25 * normal(self.channels, dtype=param_dtype),
            0.25 * normal(self.channels, dtype=param_dtype),
            **per_sample,
            residual=activation() if "residual" in self.fused else None,
        )


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse "2x320x64x64": n, channels, then any number of spatial sizes.

    Raises:
        ValueError: the text is no shape.
    """
    sizes = text.lower().split("x")
    if len(sizes) < 2 or not all(size.isascii() and size.isdigit() for size in sizes):
        raise ValueError(f"a shape is written NxC or NxCxHxW, such as 2x320x64x64; got {text!r}.")
    return tuple(map(int, sizes))


def read(path: Path) -> Iterator[Workload]:
    """Read the workloads of a CSV file with the columns of ``perf/workloads.csv``.

    The columns n, channels, groups and spatial ("64x64" or empty) are required. A modulation per
    element is outside GroupNorm's formula and is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: a row is no workload; the message has its number.
    """
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                yield _from_row(row, f"row {number}")
            except (KeyError, ValueError) as error:
                reason = f"no column {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{path}, line {number}: {reason}") from error


def _from_row(row: dict[str, str], name: str) -> Workload:
    scale_shift, residual = row.get("scale_shift") or "", row.get("residual") or ""
    for column, value, meanings in (
        ("scale_shift", scale_shift, _SCALE_SHIFT),
        ("residual", residual, _RESIDUAL),
    ):
        if value not in meanings:
            allowed = ", ".join(filter(None, meanings))
            raise ValueError(f"{column} must be empty or one of {allowed}; got {value!r}.")
    return Workload(
        " ".join(filter(None, (row.get("model"), row.get("layer")))) or name,
        int(row["n"]),
        int(row["channels"]),
        int(row["groups"]),
        tuple(map(int, filter(None, row["spatial"].split("x")))),
        row.get("dtype") or "bfloat16",
        row.get("param_dtype") or "",
        row.get("layout") or "contiguous",
        row.get("activation") or "none",
        _SCALE_SHIFT[scale_shift] + _RESIDUAL[residual],
        row.get("core") == "yes",
    )


def add_arguments(parser: argparse.ArgumentParser, direction: str) -> Any:
    """Add the flags that name workloads; return the group of flags that exclude each other.

    ``direction`` is the default of ``--direction``.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", metavar="NxCxHxW", help="one problem, such as 2x320x64x64")
    source.add_argument(
        "--workloads", type=Path, metavar="FILE", help="CSV with the columns of perf/workloads.csv"
    )
    parser.add_argument("--core", action="store_true", help="of --workloads, only core rows")
    parser.add_argument("--groups", type=int, help="needed with --shape")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--param-dtype", choices=DTYPES, default="", help="default: the input's")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    parser.add_argument("--activation", default="none", help=activations.NAMES)
    parser.add_argument("--fused", default="", metavar="A,B", help=f"some of {','.join(FUSED)}")
    parser.add_argument("--direction", choices=(*DIRECTIONS, "both"), default=direction)
    return source


def from_arguments(options: argparse.Namespace) -> list[Workload]:
    """Return the workloads that the flags of ``add_arguments`` name.

    Raises:
        OSError: the file cannot be read.
        ValueError: they name none, or there is no such problem.
    """
    if options.workloads is not None:
        workloads = [w for w in read(options.workloads) if w.core or not options.core]
        if not workloads:
            rows = "core rows" if options.core else "rows"
            raise ValueError(f"{options.workloads} has no {rows}.")
        return workloads
    if options.groups is None:
        raise ValueError("--shape needs --groups, such as --groups 32.")
    n, channels, *spatial = parse_shape(options.shape)
    fused = tuple(filter(None, options.fused.split(",")))
    return [
        Workload(
            options.shape, n, channels, options.groups, tuple(spatial), options.dtype,
            options.param_dtype, options.layout, options.activation, fused,
        )
    ]  # fmt: skip


def directions_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the directions that ``--direction`` asks for."""
    return DIRECTIONS if options.direction == "both" else (options.direction,)
