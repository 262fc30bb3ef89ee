"""What the kernels of a plan become on any GPU, found by compiling them: no GPU is needed.

Times are estimates of ``triton_gn.plan``, never measurements.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from triton_gn.ops import launches, layout
from triton_gn.ops.launches import Launch
from triton_gn.plan import (
    TARGETS,
    UNVERIFIED,
    Config,
    Device,
    Estimate,
    Problem,
    ctas_at_a_time,
    estimate,
    fields_of,
    heuristic_plan,
    plan_unverified,
)
from triton_gn.reference import Operands
from triton_gn.tools import workloads
from triton_gn.tools.compile import Kernel, compile_launch, pointers_of
from triton_gn.tools.workloads import Workload

if TYPE_CHECKING:
    from rich.table import Table


_PER_CHANNEL = set(Operands._fields) - {"x", "residual"}
_ACTIVATIONS = {f"{name}_ptr" for name in ("x", "y", "dy", "dx", "residual", "dresidual")}


@dataclass(frozen=True)
class Inspection:
    """The compiled plan of a workload, and the estimate of its time.

    ``bytes_minimum`` counts every tensor of the call once; ``bytes_moved`` what the launches ask
    memory for, of which L2 serves a part: ``estimate.dram_bytes`` is what should be left.
    """

    target: str
    device: Device
    workload: Workload
    direction: str
    problem: Problem
    config: Config
    kernels: tuple[Kernel, ...]
    estimate: Estimate
    bytes_minimum: int
    bytes_moved: int

    @property
    def spill_bytes(self) -> int:
        """The most of any of its kernels, per thread."""
        return max(kernel.spill_bytes for kernel in self.kernels)

    @property
    def registers(self) -> int:
        """The most of any of its kernels, per thread."""
        return max(kernel.registers for kernel in self.kernels)

    @property
    def converted_tiles(self) -> int:
        """Of all its kernels."""
        return sum(kernel.converted_tiles for kernel in self.kernels)

    @property
    def access_bytes(self) -> int:
        """The narrowest access to a tensor of the input's size."""
        return min(
            size
            for kernel in self.kernels
            for name, size in kernel.access_bytes.items()
            if name in _ACTIVATIONS
        )

    @property
    def widest_access_bytes(self) -> int:
        """As wide as its shape and dtype let ``access_bytes`` be."""
        return self.problem.vec * self.problem.itemsize

    @property
    def fits_one_program(self) -> bool:
        """Whether a resident plan exists, chosen or not, that reads as widely as any."""
        try:
            config = heuristic_plan(self.problem, self.device, ("resident",))
        except ValueError:
            return False
        return self.problem.access_bytes(config.tile.groups) == self.widest_access_bytes

    def to_json(self) -> dict[str, Any]:
        """As data for ``json.dumps``; times in microseconds."""
        return {
            "target": self.target,
            "problem": asdict(self.workload) | {"shape": self.workload.shape_text},
            "direction": self.direction,
            "strategy": self.config.strategy,
            "config": fields_of(self.config),
            "kernels": [self.kernel_json(kernel) for kernel in self.kernels],
            "bytes_minimum": self.bytes_minimum,
            "bytes_moved": self.bytes_moved,
            "dram_bytes": self.estimate.dram_bytes,
            "predicted_us": round(self.estimate.us, 2),
            "bound": self.estimate.bound,
            "device": asdict(self.device),
            "predicted": True,
        }

    def kernel_json(self, kernel: Kernel) -> dict[str, Any]:
        """One of the kernels as data, with how many CTAs run at a time and how often."""
        at_a_time = _at_a_time(kernel, self.device)
        waves = kernel.grid / (self.device.multiprocessors * at_a_time)
        return asdict(kernel) | {"ctas_per_multiprocessor": at_a_time, "waves": round(waves, 2)}


def inspect(
    workload: Workload, direction: str, target: str, config: Config | None = None
) -> Inspection:
    """Compile the plan of a workload for a target ("sm_90", "gfx942", ... of ``TARGETS``).

    Without ``config`` it is the rule's, as for the target's GPU in ``TARGETS``: tables of plans
    belong to GPUs that are present. The forward also writes what a backward needs.

    Raises:
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"the target must be one of {', '.join(TARGETS)}; got {target!r}.")
    device, problem = TARGETS[target], workload.problem(direction)
    config = config or heuristic_plan(problem, device)
    one, described = _planned(workload, target, problem, config)
    kernels = tuple(compile_launch(each, target) for each in described)
    # the launches that walk over the tensors, not the sums at the end
    at_a_time = min(
        _at_a_time(kernel, device)
        for kernel, each in zip(kernels, described, strict=True)
        if "TILE" in each.arguments
    )
    return replace(one, kernels=kernels, estimate=estimate(problem, config, device, at_a_time))


def _planned(
    workload: Workload, target: str, problem: Problem, config: Config
) -> tuple[Inspection, list[Launch]]:
    """What is known of a plan before it is compiled, and its launches."""
    tensors, described = _launches(workload, problem, config)
    device = TARGETS[target]
    planned = Inspection(
        target,
        device,
        workload,
        problem.direction,
        problem,
        config,
        kernels=(),
        estimate=estimate(problem, config, device),
        bytes_minimum=sum(tensor.nbytes for tensor in tensors),
        bytes_moved=sum(_bytes_moved(one, problem, config) for one in described),
    )
    return planned, described


def _launches(
    workload: Workload, problem: Problem, config: Config
) -> tuple[list[Tensor], list[Launch]]:
    """The tensors of a call, without memory, and its launches; all gradients are asked for."""
    operands = workload.given(workload.operands("meta"), problem.direction)
    x = operands.x
    given = {name: tensor for name, tensor in operands._asdict().items() if tensor is not None}
    stats = launches.statistics(x, problem.n, problem.groups, 3)
    if problem.direction == "forward":
        y = layout.empty_like(x)
        described = launches.forward_launches(problem, config, operands, y, stats, 1e-5)
        return [*given.values(), y, stats], described
    dy = layout.empty_like(x)
    grads = {name: torch.empty_like(tensor) for name, tensor in given.items()}
    described = launches.backward_launches(problem, config, dy, operands, stats, grads)
    return [*given.values(), dy, stats, *grads.values()], described


def _at_a_time(kernel: Kernel, device: Device) -> int:
    return ctas_at_a_time(device, kernel.num_warps, kernel.registers, kernel.shared_bytes)


def _bytes_moved(one: Launch, problem: Problem, config: Config) -> int:
    """What a launch asks memory for. What a program asks for again in a loop, L1 serves."""
    rows = config.parts(problem) * config.splits  # that have programs of their own
    by_all = {"stats_ptr"} if problem.direction == "backward" else set()
    in_both_passes = set()
    if "apply" in one.kernel.__name__:
        by_all.add("partials_ptr")
    elif "pipelined" in one.kernel.__name__:
        in_both_passes = {"x_ptr", "dy_ptr"}
        if problem.direction == "backward":
            in_both_passes |= {"stats_ptr", *(f"{name}_ptr" for name in Operands._fields)}
    total = 0
    for name, tensor in pointers_of(one):
        times = 2 if name in in_both_passes else 1
        if name.removesuffix("_ptr") in _PER_CHANNEL:
            times *= rows * problem.channels // tensor.numel()
        elif name in by_all:  # the programs of a group
            times *= config.num_partials
        elif name == "partials_ptr" and in_both_passes:  # written, then read by all of them
            times += config.num_partials
        total += times * tensor.nbytes
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``python -m triton_gn inspect``."""
    workloads.add_arguments(parser, direction="forward")
    parser.add_argument(
        "--target", choices=TARGETS, default="sm_90", help="the GPU to compile for (sm_90: an H100)"
    )
    parser.add_argument(
        "--allow-unverified",
        action="store_true",
        help="let the rule choose plans of kinds that no GPU has proven yet",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each direction")


def run(options: argparse.Namespace) -> int:
    """Inspect what the flags ask for; 1 where a plan does not compile or a kernel spills."""
    choose = plan_unverified if options.allow_unverified else heuristic_plan
    cases = [
        (workload, direction, options.target, choose)
        for workload in workloads.from_arguments(options)
        for direction in workloads.directions_of(options)
    ]
    found = list(_shown(_inspected(cases), len(cases), options.json))
    if len(cases) > 1:
        print(Totals.of(found), file=sys.stderr)
    if len(cases) > 1 and not options.allow_unverified:
        names, allowed = ", ".join(UNVERIFIED), _with_unverified(cases)
        print(f"all, were {names} allowed: {_ratios(_bytes_of(allowed))}", file=sys.stderr)
    return int(any(isinstance(one, Failure) or one.spill_bytes for one in found))


def _with_unverified(cases: Sequence["_Case"]) -> list[Inspection]:
    """What the rule would plan if it could choose any kind of plan; not compiled."""
    found = []
    for workload, direction, target, _ in cases:
        problem = workload.problem(direction)
        config = plan_unverified(problem, TARGETS[target])
        found.append(_planned(workload, target, problem, config)[0])
    return found


@dataclass(frozen=True)
class Failure:
    """A plan that did not compile, and what the compiler said."""

    workload: Workload
    direction: str
    error: str

    def to_json(self) -> dict[str, Any]:
        """As data for ``json.dumps``."""
        problem = asdict(self.workload) | {"shape": self.workload.shape_text}
        return {"problem": problem, "direction": self.direction, "error": self.error}


_Case = tuple[Workload, str, str, Callable[[Problem, Device], Config]]


def _inspected(cases: Sequence[_Case]) -> Iterator[Inspection | Failure]:
    if len(cases) == 1:
        yield from map(_inspect_case, cases)
        return
    # spawned: a forked process could inherit the locks of PyTorch's threads
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_inspect_case, cases)


def _inspect_case(case: _Case) -> Inspection | Failure:
    workload, direction, target, choose = case
    config = choose(workload.problem(direction), TARGETS[target])
    try:
        return inspect(workload, direction, target, config)
    except Exception as error:  # the other rows are worth seeing
        return Failure(workload, direction, f"{type(error).__name__}: {error}")


def _shown(
    found: Iterable[Inspection | Failure], count: int, as_json: bool
) -> Iterator[Inspection | Failure]:
    """The same, each printed when it is there."""
    if as_json:
        for one in found:
            print(json.dumps(one.to_json()), flush=True)
            yield one
        return
    from rich.console import Console
    from rich.progress import track

    table = _summary()
    errors = Console(stderr=True)
    for one in track(found, "compiling", total=count, console=errors, transient=True):
        if count > 1 or isinstance(one, Failure):
            table.add_row(*_row(one))
        else:
            _print_details(one)
        yield one
    if table.rows:
        Console().print(table)


def _print_details(one: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    device = one.device
    fields = ", ".join(f"{name} {value}" for name, value in fields_of(one.config).items())
    bound = one.estimate
    print(
        f"{_described(one.workload)}, {one.direction}\n"
        f"for {device.name} ({one.target}): {device.multiprocessors} multiprocessors, "
        f"{device.l2_bytes >> 20} MiB of L2, {device.dram_gb_per_s} GB/s of DRAM\n"
        f"plan: {fields}"
    )
    table = Table()
    titles = (
        "grid", "warps", "registers", "spilled", "shared", "CTAs/SM", "waves",
        "instructions/element",
    )  # fmt: skip
    for title in ("kernel", *titles):
        table.add_column(title, justify="left" if title == "kernel" else "right")
    for kernel in one.kernels:
        numbers = one.kernel_json(kernel)
        table.add_row(
            kernel.name,
            *(
                "-" if numbers[name] is None else str(numbers[name])
                for name in (
                    "grid", "num_warps", "registers", "spill_bytes", "shared_bytes",
                    "ctas_per_multiprocessor", "waves", "instructions",
                )
            ),
        )  # fmt: skip
    Console().print(table)
    for kernel in one.kernels:
        widths = ", ".join(f"{name} {size}" for name, size in kernel.access_bytes.items())
        print(f"bytes per access of {kernel.name}: {widths}")
    print(
        f"moves {one.bytes_moved / 1e6:.2f} MB, {one.bytes_moved / one.bytes_minimum:.2f} of the "
        f"minimum; {bound.dram_bytes / 1e6:.2f} MB of them from or to DRAM\n"
        f"predicted, not measured: {bound.us:.1f} us, bound by {bound.bound}"
    )


def _described(workload: Workload) -> str:
    fused = "".join(f" + {name}" for name in workload.fused)
    return (
        f"{workload.shape_text}, {workload.groups} groups, {workload.dtype}, {workload.layout}, "
        f"{workload.activation}{fused}"
    )


def _summary() -> "Table":
    from rich.table import Table

    table = Table(caption="times are predicted, not measured")
    for title in ("workload", "direction", "strategy", "bound"):
        table.add_column(title)
    for title in ("registers", "spilled", "bytes/access", "bytes/minimum", "us"):
        table.add_column(title, justify="right")
    return table


def _row(one: Inspection | Failure) -> list[str]:
    head = [_described(one.workload), one.direction]
    if isinstance(one, Failure):
        return [*head, one.error.splitlines()[0]]
    return [
        *head,
        one.config.strategy,
        one.estimate.bound,
        str(one.registers),
        str(one.spill_bytes),
        f"{one.access_bytes} of {one.widest_access_bytes}",
        f"{one.bytes_moved / one.bytes_minimum:.2f}",
        f"{one.estimate.us:.1f}",
    ]


@dataclass(frozen=True)
class Totals:
    """What many inspections come to; prints as text."""

    plans: int
    failures: int
    spills: int
    narrow: int
    converted: int
    # of all plans, and of those whose groups one program could hold: minimum, moved, DRAM
    bytes_of_all: tuple[int, int, int]
    bytes_of_one_tile: tuple[int, int, int]
    one_tile: int

    @classmethod
    def of(cls, found: Sequence[Inspection | Failure]) -> Self:
        """Add the inspections up."""
        good = [one for one in found if isinstance(one, Inspection)]
        one_tile = [one for one in good if one.fits_one_program]
        return cls(
            len(found),
            len(found) - len(good),
            sum(one.spill_bytes > 0 for one in good),
            sum(one.access_bytes < one.widest_access_bytes for one in good),
            sum(one.converted_tiles > 0 for one in good),
            _bytes_of(good),
            _bytes_of(one_tile),
            len(one_tile),
        )

    def __str__(self) -> str:
        return (
            f"{self.plans} plans: {self.failures} do not compile, {self.spills} spill, "
            f"{self.narrow} have accesses narrower than their shape allows, "
            f"{self.converted} convert fragments to another layout\n"
            f"{self.one_tile} whose tile fits one program: {_ratios(self.bytes_of_one_tile)}\n"
            f"all: {_ratios(self.bytes_of_all)}"
        )


def _bytes_of(found: Sequence[Inspection]) -> tuple[int, int, int]:
    return (
        sum(one.bytes_minimum for one in found),
        sum(one.bytes_moved for one in found),
        sum(one.estimate.dram_bytes for one in found),
    )


def _ratios(counts: tuple[int, int, int]) -> str:
    minimum, moved, dram = counts
    if not minimum:
        return "none"
    return (
        f"{moved / 1e9:.2f} GB moved, {moved / minimum:.3f} of the minimum; "
        f"{dram / 1e9:.2f} GB of DRAM, {dram / minimum:.3f}"
    )
