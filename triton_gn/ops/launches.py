"""Translate a plan into Launch descriptions: kernel, grid, arguments, workspaces."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from triton_gn.ops import layout
from triton_gn.plan import Config, Problem, Tile, partials_at_a_time
from triton_gn.reference import Operands, compute_dtype

_REDUCE_WARPS = 4
_MERGE_WARPS = 4

# part of a backward by split: up to the sums of each group, or from them on; None is the whole
Half = Literal["reduce", "apply"] | None


class Workspace(Tensor):
    """Memory through which the launches of a call pass results; each call allocates its own."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch, described in full: ``grid`` programs."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int  # of a program

    def arguments_on(self, nvidia: bool) -> dict[str, Any]:
        """Return all arguments of the kernel, for an NVIDIA GPU or another one."""
        if "TILE" not in self.arguments:
            return self.arguments
        return self.arguments | {"TILE": self.arguments["TILE"].on(nvidia)}

    def options(self, nvidia: bool) -> dict[str, Any]:
        """Return the options of the compiler."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if nvidia:
            # all registers that there are: otherwise ptxas spills a few for the sake of occupancy
            options["maxnreg"] = min(255, 65536 // (32 * self.num_warps))
        return options


@functools.cache
def _kernels() -> ModuleType:
    """Import the device code, and triton with it."""
    from triton_gn import kernels
    from triton_gn.kernels import (  # noqa: F401
        activations,
        params,
        pipelined,
        resident,
        split,
        tile,
    )

    return kernels


def _activation(problem: Problem) -> Any:
    """Return the device function of the activation or of its gradient, None without one."""
    functions = _kernels().activations.device_functions(problem.activation)
    return functions.forward if problem.direction == "forward" else functions.gradient


@functools.cache
def _device_tile(tile: Tile, threads: int) -> Any:
    at_once = partials_at_a_time(tile.padded_groups)
    return _kernels().tile.Tile(**asdict(tile), threads=threads, partials_at_once=at_once)


def problem_of(direction: str, operands: Operands, groups: int, activation: str) -> Problem:
    """Return the problem of operands whose x is non-empty and in a native memory format."""
    x = operands.x
    channels_last = layout.is_channels_last(x)
    assert channels_last is not None
    n, channels = x.shape[:2]
    pixels = x.numel() // (n * channels)
    return Problem(
        direction,
        n,
        channels,
        groups,
        pixels,
        str(x.dtype).removeprefix("torch."),
        channels_last,
        activation,
        pre_add=operands.pre_add is not None,
        residual=operands.residual is not None,
        per_sample=pixels == 1
        and any(
            values is not None and values.numel() > channels
            for values in (operands.scale, operands.shift, operands.pre_add)
        ),
    )


def statistics(x: Tensor, *shape: int) -> Tensor:
    """Allocate sums or statistics of x, uninitialised: float32, or float64 if x is."""
    return torch.empty(shape, dtype=compute_dtype(x), device=x.device)


def _workspace(x: Tensor, *shape: int) -> Tensor:
    return statistics(x, *shape).as_subclass(Workspace)


def _sizes(problem: Problem, config: Config) -> dict[str, Any]:
    """Return the kernel's arguments for the shape of x and its tile."""
    sizes: dict[str, Any] = {
        "groups": problem.groups,
        "pixels": problem.n if config.tile.batch_rows else problem.pixels,
        "row_vecs": problem.row_vecs,
        "TILE": _device_tile(config.tile, 32 * config.num_warps),
    }
    if config.strategy != "resident":
        sizes |= {
            "splits": config.splits,
            "split_vecs": config.split_vecs,
            "num_partials": config.num_partials,
        }
    return sizes


def _pipeline(problem: Problem, config: Config, x: Tensor) -> Any:
    """Return the stages of a pipelined launch; its counters are zero before each call."""
    stages_per_sample = config.stages_per_sample(problem)
    stages = problem.n * stages_per_sample
    counters = torch.zeros(1 + stages, dtype=torch.int32, device=x.device)
    return _kernels().pipelined.Pipeline(
        counters.as_subclass(Workspace),
        stages,
        stages_per_sample,
        config.blocks * config.num_partials,
        config.prefetch_distance(problem),
    )


def _params(operands: Operands) -> Any:
    """Return the per-channel operands as a kernel's argument."""
    tile = _kernels().tile

    def per_channel(values: Tensor | None) -> Any:
        if values is None:
            return None
        if values.stride(-1) != 1 and values.shape[-1] > 1:
            raise RuntimeError(
                "the kernels read operands whose channels are adjacent in memory; got strides "
                f"{values.stride()}. Make them dense with autograd.native."
            )
        shared = values.ndim == 1 or values.shape[0] == 1
        return tile.PerChannel(values, 0 if shared else values.stride(0))

    return tile.Params(*(per_channel(getattr(operands, name)) for name in tile.Params._fields))


def forward_launches(
    problem: Problem,
    config: Config,
    operands: Operands,
    y: Tensor | None,
    stats: Tensor | None,
    eps: float,
    moments: Tensor | None = None,
) -> list[Launch]:
    """Describe the launches that fill y and, unless None, stats (N, G, 3).

    ``moments``, for split only, are the result of the first launch. With y, they are precomputed:
    (N, G, 4, parts) in any number of parts, and only the second launch remains. Without y, they are
    filled: (4, N, G), merged over all of x.
    """
    programs = config.programs(problem)
    inputs = _kernels().tile.Inputs(operands.x, operands.residual, _params(operands))
    sizes = _sizes(problem, config)
    apply = {
        "inputs": inputs, "y_ptr": y, "stats_ptr": stats, "eps": float(eps),
        "ACTIVATION": _activation(problem),
    } | sizes  # fmt: skip
    if config.strategy == "resident":
        kernel = _kernels().resident.group_norm_forward_resident_kernel
        return [Launch(kernel, programs, apply, config.num_warps)]
    groups = problem.n * problem.groups
    partials: dict[str, Any]
    partials = {"partials_ptr": _workspace(operands.x, groups * config.num_partials, 4)}
    if config.strategy == "pipelined":
        kernel = _kernels().pipelined.group_norm_forward_pipelined_kernel
        pipeline = {"pipeline": _pipeline(problem, config, operands.x)}
        arguments = apply | partials | pipeline
        return [Launch(kernel, config.persistent_programs, arguments, config.num_warps)]
    first = Launch(
        _kernels().split.group_norm_forward_split_moments_kernel,
        programs,
        {"x_ptr": inputs.x_ptr, "affine_params": inputs.affine_params} | partials | sizes,
        config.num_warps,
    )
    if y is None:
        merge = _merge_launch(groups, config.num_partials, partials | {"merged_ptr": moments})
        return [first, merge]
    if moments is not None:
        partials = {"partials_ptr": moments, "num_partials": moments.shape[3]}
    second = Launch(
        _kernels().split.group_norm_forward_split_apply_kernel,
        programs,
        apply | partials,
        config.num_warps,
    )
    return [first, second] if moments is None else [second]


def _merge_launch(groups: int, num_partials: int, tensors: dict[str, Any]) -> Launch:
    """Describe the launch that merges the partial moments of each group."""
    at_once = partials_at_a_time(1)
    per_program = max(1, 32 * _MERGE_WARPS // at_once)
    sizes = {
        "groups": groups,
        "num_partials": num_partials,
        "PARTIALS": at_once,
        "GROUPS": per_program,
    }
    kernel = _kernels().split.group_norm_merge_moments_kernel
    return Launch(kernel, -(-groups // per_program), tensors | sizes, _MERGE_WARPS)


def _grad_rows(problem: Problem, config: Config) -> int:
    """Return the number of rows of the partial gradients per channel."""
    return config.parts(problem) * config.splits


def _partial_grads(
    problem: Problem, config: Config, x: Tensor, grads: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return where programs write partial gradients per channel, and the reductions of these.

    If a program's part is the whole gradient (one sample in one split), it is written to its final
    place.
    """
    rows = _grad_rows(problem, config)
    partials, reductions = {}, {}
    for name in _kernels().tile.Params._fields:
        if name not in grads:
            continue
        total = grads[name]
        total_rows = total.numel() // problem.channels
        if total_rows == rows:
            partials[name] = total
        else:
            partials[name] = _workspace(x, rows, problem.channels)
            reductions[name] = _kernels().params.Reduction(partials[name], total, total_rows)
    return partials, reductions


def _as_params(values: Mapping[str, Any]) -> Any:
    """Return ``values`` as a ``Params``, with None for missing fields."""
    params = _kernels().tile.Params
    return params(*map(values.get, params._fields))


def _reduce_programs(problem: Problem, reductions: Mapping[str, Any]) -> int:
    """Return how many programs do the reductions."""
    total_rows: int = sum(reduction.total_rows for reduction in reductions.values())
    cols: int = _kernels().params.REDUCE_COLS.value
    return total_rows * -(-problem.channels // cols)


def _param_launches(
    problem: Problem, config: Config, reductions: Mapping[str, Any]
) -> list[Launch]:
    """Describe the launch that does the reductions, if there are any."""
    if not reductions:
        return []
    arguments = {
        "reductions": _as_params(reductions),
        "rows": _grad_rows(problem, config),
        "channels": problem.channels,
    }
    kernel = _kernels().params.group_norm_params_kernel
    return [Launch(kernel, _reduce_programs(problem, reductions), arguments, _REDUCE_WARPS)]


def backward_launches(
    problem: Problem,
    config: Config,
    dy: Tensor | None,
    operands: Operands,
    stats: Tensor,
    grads: Mapping[str, Tensor],
    sums: Tensor | None = None,
    half: Half = None,
) -> list[Launch]:
    """Describe the launches that fill ``grads``, named as the operands.

    residual's gradient is one of them only with an activation. ``sums``, for a half, are
    sum(dx_hat) and sum(dx_hat * x_hat) of each group. The first half fills them in parts,
    (N, G, 2, num_partials), and its ``grads`` are those at precomputed statistics. The second half
    reads them, (N, G, 2, 1), for the gradients of x and pre_add; dy may be None.
    """
    programs = config.programs(problem)
    partials, reductions = _partial_grads(problem, config, operands.x, grads)
    tile = _kernels().tile
    inputs = tile.Inputs(operands.x, operands.residual, _params(operands), dy, stats)
    dx, dresidual, param_grads = grads.get("x"), grads.get("residual"), _as_params(partials)
    arguments = {
        "inputs": inputs,
        "outputs": tile.Outputs(dx, dresidual, param_grads),
        "ACTIVATION": _activation(problem),
    } | _sizes(problem, config)
    if config.strategy == "resident":
        kernel = _kernels().resident.group_norm_backward_resident_kernel
        launch = Launch(kernel, programs, arguments, config.num_warps)
        return [launch, *_param_launches(problem, config, reductions)]

    if sums is None:
        sums = _workspace(operands.x, problem.n * problem.groups * config.num_partials, 2)
    arguments["partials_ptr"] = sums
    first = Launch(
        _kernels().split.group_norm_backward_split_sums_kernel,
        programs,
        # without dx, which this kernel does not write
        arguments | {"outputs": tile.Outputs(None, dresidual, param_grads)},
        config.num_warps,
    )
    if dx is None and "pre_add" not in grads:
        return [first, *_param_launches(problem, config, reductions)]
    if config.strategy == "pipelined":
        kernel = _kernels().pipelined.group_norm_backward_pipelined_kernel
        arguments |= {"pipeline": _pipeline(problem, config, operands.x)}
        launch = Launch(kernel, config.persistent_programs, arguments, config.num_warps)
        return [launch, *_param_launches(problem, config, reductions)]

    if half == "reduce":
        arguments["partials_ptr"] = None
    elif half == "apply":
        arguments["num_partials"] = 1
    # this launch writes the partials of dpre_add: a launch after it has to add them up
    dpre_add = {name: reductions.pop(name) for name in ("pre_add",) if name in reductions}
    apply = Launch(
        _kernels().split.group_norm_backward_split_apply_kernel,
        programs + _reduce_programs(problem, reductions),
        arguments
        | {
            "outputs": tile.Outputs(dx, None, _as_params({"pre_add": param_grads.pre_add})),
            "reductions": _as_params(reductions),
            "samples": problem.n,
            "apply_programs": programs,
        },
        config.num_warps,
    )
    before = [] if half == "apply" else [first]
    return [*before, apply, *_param_launches(problem, config, dpre_add)]
