"""Kernel launches of a plan: allocation, grid, arguments. Nothing here decides."""

import functools
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_gn.ops.settings import Settings
from triton_gn.plan import Config, Device, Problem, Tile, next_power_of_2, plan, slots_at_a_time

_PARAM_COLS = 32  # channels per program that sums parameter gradients up: one 128-byte line
_PARAM_ROWS = 64


@dataclass(frozen=True)
class Launch:
    """One kernel launch, described in full."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int

    def options(self, nvidia: bool) -> dict[str, Any]:
        """What else the compiler is told."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if nvidia:
            # all the registers there are: else ptxas spills a few for occupancy's sake
            options["maxnreg"] = min(255, 65536 // (32 * self.num_warps))
        return options


@functools.cache
def _kernels() -> ModuleType:
    """The device code; importing it imports triton."""
    from triton_gn import kernels
    from triton_gn.kernels import params, resident, split, tile  # noqa: F401

    return kernels


@functools.cache
def _device_tile(tile: Tile) -> Any:
    return _kernels().tile.Tile(**asdict(tile))


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.name,
        properties.multi_processor_count,
        properties.L2_cache_size,
        properties.warp_size,
    )


def problem_of(
    direction: str, x: Tensor, groups: int, channels_last: bool
) -> tuple[Problem, Device]:
    """The problem that the non-empty x poses, and its GPU; without one, an H100."""
    n, channels = x.shape[:2]
    dtype = str(x.dtype).removeprefix("torch.")
    pixels = x.numel() // (n * channels)
    problem = Problem(direction, n, channels, groups, pixels, dtype, channels_last)
    return problem, _cuda_device(x.device.index) if x.is_cuda else Device()


def plan_for(
    direction: str, x: Tensor, groups: int, channels_last: bool, settings: Settings
) -> tuple[Problem, Config]:
    """The problem that x poses and its plan under these settings."""
    problem, device = problem_of(direction, x, groups, channels_last)
    return problem, plan(problem, device, settings.batch_invariant, settings.plan_override)


def statistics(x: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32, float64 for float64: what sums and statistics of x are kept in."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=x.device)


def _sizes(problem: Problem, config: Config) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "groups": problem.groups,
        "pixels": problem.pixels,
        "row_vecs": problem.row_vecs,
    }
    if config.strategy == "split":
        sizes |= {
            "chunks": config.chunks,
            "chunk_vecs": config.chunk_vecs,
            "slots": config.slots,
        }
    return sizes


def forward_launches(
    problem: Problem,
    config: Config,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    eps: float,
) -> list[Launch]:
    """Launches that fill y and, unless None, stats (N, G, 3)."""
    programs = config.programs(problem)
    sizes = _sizes(problem, config) | {"TILE": _device_tile(config.tile)}
    operands = {
        "x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "y_ptr": y, "stats_ptr": stats,
        "eps": float(eps),
    }  # fmt: skip
    if config.strategy == "resident":
        kernel = _kernels().resident.group_norm_forward_resident_kernel
        return [Launch(kernel, programs, operands | sizes, config.num_warps)]
    split = _kernels().split
    partials = statistics(x, problem.n * problem.groups * config.slots, 4)
    return [
        Launch(
            split.group_norm_forward_split_moments_kernel,
            programs,
            {"x_ptr": x, "partials_ptr": partials} | sizes,
            config.num_warps,
        ),
        Launch(
            split.group_norm_forward_split_apply_kernel,
            programs,
            operands | sizes | {"partials_ptr": partials, "SLOTS": slots_at_a_time(config)},
            config.num_warps,
        ),
    ]


def backward_launches(
    problem: Problem,
    config: Config,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dbias: Tensor | None,
    dweight: Tensor | None,
) -> list[Launch]:
    """Launches that fill dx, dbias and dweight, each unless None."""
    programs = config.programs(problem)
    rows = problem.n * config.chunks
    # one row of partial sums is the sum: the kernel writes it where it belongs
    partial = functools.partial(_param_partial, x, rows, problem.channels)
    dbias_partial, dweight_partial = partial(dbias), partial(dweight)
    operands = {
        "dy_ptr": dy, "x_ptr": x, "weight_ptr": weight, "stats_ptr": stats,
        "dbias_ptr": dbias_partial, "dweight_ptr": dweight_partial,
    }  # fmt: skip
    sizes = _sizes(problem, config) | {"TILE": _device_tile(config.tile)}
    params = {
        "dbias_partial_ptr": dbias_partial, "dweight_partial_ptr": dweight_partial,
        "dbias_ptr": dbias, "dweight_ptr": dweight,
        "ROWS": min(_PARAM_ROWS, next_power_of_2(rows)), "COLS": _PARAM_COLS,
    }  # fmt: skip
    reduce_params = rows > 1 and (dbias is not None or dweight is not None)
    param_programs = -(-problem.channels // _PARAM_COLS) if reduce_params else 0
    param_launch = Launch(
        _kernels().params.group_norm_params_kernel,
        param_programs,
        params | {"rows": rows, "channels": problem.channels},
        4,
    )
    if config.strategy == "resident":
        kernel = _kernels().resident.group_norm_backward_resident_kernel
        launch = Launch(kernel, programs, operands | sizes | {"dx_ptr": dx}, config.num_warps)
        return [launch, param_launch] if reduce_params else [launch]

    split = _kernels().split
    partials = statistics(x, problem.n * problem.groups * config.slots, 2)
    sums = Launch(
        split.group_norm_backward_split_sums_kernel,
        programs,
        operands | sizes | {"partials_ptr": partials},
        config.num_warps,
    )
    if dx is None:
        return [sums, param_launch] if reduce_params else [sums]
    apply = Launch(
        split.group_norm_backward_split_apply_kernel,
        programs + param_programs,
        operands
        | sizes
        | params
        | {
            "partials_ptr": partials, "dx_ptr": dx, "samples": problem.n,
            "apply_programs": programs, "SLOTS": slots_at_a_time(config),
        },
        config.num_warps,
    )  # fmt: skip
    return [sums, apply]


def _param_partial(x: Tensor, rows: int, channels: int, total: Tensor | None) -> Tensor | None:
    return total if total is None or rows == 1 else statistics(x, rows, channels)


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Launch on the current stream of ``device``, whichever device is the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            options = launch.options(nvidia=torch.version.hip is None)
            launch.kernel[(launch.grid,)](**launch.arguments, **options)
