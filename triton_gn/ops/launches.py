"""Kernel launches of a plan: workspaces, grid, arguments. Nothing here decides or launches."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from triton_gn.ops import layout
from triton_gn.plan import (
    Config,
    Problem,
    Tile,
    partials_at_a_time,
)
from triton_gn.reference import Operands, compute_dtype

_PARAM_COLS = 32  # channels per program that sums parameter gradients up: one 128-byte line
_PARAM_ROWS = 64
_PARAM_WARPS = 4
_MERGE_WARPS = 4

# which part of a backward by split, cut where the sums over groups are known; None for the whole
Half = Literal["reduce", "apply"] | None


class Workspace(Tensor):
    """Memory that launches of a call hand each other, allocated anew at each call."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch, described in full: ``grid`` programs."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int  # of a program

    def arguments_on(self, nvidia: bool) -> dict[str, Any]:
        """All of the kernel's arguments, on an NVIDIA GPU or elsewhere."""
        if "TILE" not in self.arguments:
            return self.arguments
        return self.arguments | {"TILE": self.arguments["TILE"].on(nvidia)}

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
    """The device function of the problem's activation, in its direction; None without one."""
    functions = _kernels().activations.DEVICE_FUNCTIONS[problem.activation]
    return functions.forward if problem.direction == "forward" else functions.gradient


@functools.cache
def _device_tile(tile: Tile, threads: int) -> Any:
    return _kernels().tile.Tile(**asdict(tile), threads=threads)


def problem_of(direction: str, operands: Operands, groups: int, activation: str) -> Problem:
    """The problem that operands with a non-empty, native x pose."""
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
    """Uninitialised float32, float64 for float64: what sums and statistics of x are kept in."""
    return torch.empty(shape, dtype=compute_dtype(x), device=x.device)


def _workspace(x: Tensor, *shape: int) -> Tensor:
    return statistics(x, *shape).as_subclass(Workspace)


def _sizes(problem: Problem, config: Config) -> dict[str, Any]:
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


def _slots(config: Config, num_partials: int) -> dict[str, Any]:
    """How many partials there are of each group, for a launch that merges them."""
    return {"num_partials": num_partials, "PARTIALS": partials_at_a_time(config.tile.padded_groups)}


def _pipeline(problem: Problem, config: Config, x: Tensor) -> dict[str, Any]:
    """Counters, zeros before each call, and what goes through a pipeline in which order."""
    in_sample = config.units_in_sample(problem)
    units = problem.n * in_sample
    return _slots(config, config.num_partials) | {
        "counters_ptr": torch.zeros(1 + units, dtype=torch.int32, device=x.device).as_subclass(
            Workspace
        ),
        "order": _kernels().pipelined.Units(
            units, in_sample, config.blocks * config.num_partials, config.prefetch_distance(problem)
        ),
    }


def _params(operands: Operands) -> Any:
    """The operands per channel, for a kernel."""
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
    """Launches that fill y and, unless None, stats (N, G, 3).

    ``moments``, only of split: what the two launches have between them. With y they are given in
    any number of parts, (N, G, 4, parts); without y, filled: (4, N, G), of all that x has.
    """
    programs = config.programs(problem)
    sizes = _sizes(problem, config)
    x = {"x_ptr": operands.x, "affine_params": _params(operands)}
    apply = {
        "residual_ptr": operands.residual, "y_ptr": y, "stats_ptr": stats, "eps": float(eps),
        "ACTIVATION": _activation(problem),
    }  # fmt: skip
    if config.strategy == "resident":
        kernel = _kernels().resident.group_norm_forward_resident_kernel
        return [Launch(kernel, programs, x | apply | sizes, config.num_warps)]
    groups = problem.n * problem.groups
    partials = {"partials_ptr": _workspace(operands.x, groups * config.num_partials, 4)}
    if config.strategy == "pipelined":
        kernel = _kernels().pipelined.group_norm_forward_pipelined_kernel
        arguments = x | apply | partials | sizes | _pipeline(problem, config, operands.x)
        return [Launch(kernel, config.persistent_programs, arguments, config.num_warps)]
    first = Launch(
        _kernels().split.group_norm_forward_split_moments_kernel,
        programs,
        x | partials | sizes,
        config.num_warps,
    )
    if y is None:
        merge = _merge_launch(groups, config.num_partials, partials | {"merged_ptr": moments})
        return [first, merge]
    num_partials = config.num_partials
    if moments is not None:
        partials, num_partials = {"partials_ptr": moments}, moments.shape[3]
    second = Launch(
        _kernels().split.group_norm_forward_split_apply_kernel,
        programs,
        x | apply | partials | sizes | _slots(config, num_partials),
        config.num_warps,
    )
    return [first, second] if moments is None else [second]


def _merge_launch(groups: int, num_partials: int, tensors: dict[str, Any]) -> Launch:
    at_a_time = partials_at_a_time(1)
    per_program = max(1, 32 * _MERGE_WARPS // at_a_time)
    sizes = {
        "groups": groups,
        "num_partials": num_partials,
        "PARTIALS": at_a_time,
        "GROUPS": per_program,
    }
    kernel = _kernels().split.group_norm_merge_moments_kernel
    return Launch(kernel, -(-groups // per_program), tensors | sizes, _MERGE_WARPS)


def _parts(problem: Problem, config: Config) -> int:
    """Rows of the partial gradients per channel."""
    return config.parts(problem) * config.splits


def _param_parts(
    problem: Problem, config: Config, x: Tensor, grads: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Where each program writes its part of the gradients per channel, and how the parts add up.

    A part that is all there is, of one sample in one split, is written where the sum belongs.
    """
    rows = _parts(problem, config)
    parts, reductions = {}, {}
    for name in _kernels().tile.Params._fields:
        if name not in grads:
            continue
        total = grads[name]
        total_rows = total.numel() // problem.channels
        if total_rows == rows:
            parts[name] = total
        else:
            parts[name] = _workspace(x, rows, problem.channels)
            reductions[name] = _kernels().params.Reduction(parts[name], total, total_rows)
    return parts, reductions


def _all_params(some: dict[str, Any]) -> Any:
    """A ``Params`` of the fields that there are."""
    params = _kernels().tile.Params
    return params(*map(some.get, params._fields))


def _reduce(problem: Problem, reductions: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many programs do the reductions, and their arguments."""
    arguments = {
        "reductions": _all_params(reductions),
        "ROWS": _PARAM_ROWS,
        "COLS": _PARAM_COLS,
    }
    totals = sum(reduction.total_rows for reduction in reductions.values())
    return totals * -(-problem.channels // _PARAM_COLS), arguments


def _param_launches(problem: Problem, config: Config, reductions: dict[str, Any]) -> list[Launch]:
    """A launch that does the reductions, if there are any."""
    programs, arguments = _reduce(problem, reductions)
    arguments |= {"rows": _parts(problem, config), "channels": problem.channels}
    kernel = _kernels().params.group_norm_params_kernel
    return [Launch(kernel, programs, arguments, _PARAM_WARPS)] if reductions else []


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
    """Launches that fill ``grads``, named as the operands; residual's only with an activation.

    ``sums``, of a half: sum(dx_hat), sum(dx_hat * x_hat) of each group. The first half leaves them
    in parts (N, G, 2, num_partials), and its ``grads`` are those at precomputed statistics; the
    second takes them, (N, G, 2, 1), for the gradients of x and pre_add, to which dy need not add
    anything.
    """
    programs = config.programs(problem)
    parts, reductions = _param_parts(problem, config, operands.x, grads)
    inputs = {
        "dy_ptr": dy, "x_ptr": operands.x, "residual_ptr": operands.residual,
        "affine_params": _params(operands), "stats_ptr": stats,
        "ACTIVATION": _activation(problem),
    } | _sizes(problem, config)  # fmt: skip
    outputs = {"dresidual_ptr": grads.get("residual"), "grads": _all_params(parts)}
    if config.strategy == "resident":
        kernel = _kernels().resident.group_norm_backward_resident_kernel
        outputs |= {"dx_ptr": grads.get("x")}
        launch = Launch(kernel, programs, inputs | outputs, config.num_warps)
        return [launch, *_param_launches(problem, config, reductions)]

    inputs["partials_ptr"] = sums
    if sums is None:
        partials = _workspace(operands.x, problem.n * problem.groups * config.num_partials, 2)
        inputs["partials_ptr"] = partials
    first = Launch(
        _kernels().split.group_norm_backward_split_sums_kernel,
        programs,
        inputs | outputs,
        config.num_warps,
    )
    if "x" not in grads and "pre_add" not in grads:
        return [first, *_param_launches(problem, config, reductions)]
    if config.strategy == "pipelined":
        kernel = _kernels().pipelined.group_norm_backward_pipelined_kernel
        outputs |= {"dx_ptr": grads.get("x")} | _pipeline(problem, config, operands.x)
        launch = Launch(kernel, config.persistent_programs, inputs | outputs, config.num_warps)
        return [launch, *_param_launches(problem, config, reductions)]
    num_partials = _slots(config, 1 if half == "apply" else config.num_partials)
    at_given_statistics = {"partials_ptr": None} if half == "reduce" else {}
    # the apply launch writes the parts of dpre_add, and sums up what the launch before has left
    dpre_add = reductions.pop("pre_add", None)
    last = {} if dpre_add is None else {"pre_add": dpre_add}
    param_programs, arguments = _reduce(problem, reductions)
    apply = Launch(
        _kernels().split.group_norm_backward_split_apply_kernel,
        programs + param_programs,
        inputs
        | arguments
        | {
            "dx_ptr": grads.get("x"), "dpre_add_ptr": parts.get("pre_add"), "samples": problem.n,
            "apply_programs": programs,
        }
        | num_partials
        | at_given_statistics,
        config.num_warps,
    )  # fmt: skip
    before = [] if half == "apply" else [first]
    return [*before, apply, *_param_launches(problem, config, last)]
