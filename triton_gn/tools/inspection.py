"""Compile plans for GPUs that need not be present: registers, spills, accesses, bytes moved.

``inspect`` and ``python -m perf sweep --target`` print the results. Times are estimates of
``triton_gn.plan``, never measurements.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import Tensor

from triton_gn.ops import autograd, launches, layout
from triton_gn.ops.launches import Launch
from triton_gn.plan import (
    TARGETS,
    Config,
    Device,
    Estimate,
    Problem,
    ctas_per_multiprocessor,
    estimate,
    fields_of,
    heuristic_plan,
)
from triton_gn.reference import Operands
from triton_gn.tools.compile import Kernel, compile_launch, pointers_of
from triton_gn.tools.workloads import Workload

_PER_CHANNEL = set(Operands._fields) - {"x", "residual"}
_ACTIVATIONS = {f"{name}_ptr" for name in ("x", "y", "dy", "dx", "residual", "dresidual")}
_S = TypeVar("_S")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Case:
    """A plan to compile: the config of a workload's problem, for a target of ``TARGETS``."""

    workload: Workload
    problem: Problem
    target: str
    config: Config

    @property
    def device(self) -> Device:
        """The GPU that stands for the target."""
        return TARGETS[self.target]

    def compile(self) -> "Inspection":
        """Compile the launches of the plan."""
        tensors, described = launches_of(self.workload, self.problem, self.config)
        kernels = tuple(compile_launch(launch, self.target) for launch in described)
        # of the launches that walk over the tensors, not of the sums at the end
        resident_ctas = min(
            _resident_ctas(kernel, self.device)
            for kernel, launch in zip(kernels, described, strict=True)
            if "TILE" in launch.arguments
        )
        return Inspection(
            **vars(self),
            kernels=kernels,
            estimate=estimate(self.problem, self.config, self.device, resident_ctas),
            bytes_minimum=sum(tensor.nbytes for tensor in tensors),
            bytes_moved=bytes_moved(described, self.problem, self.config),
        )

    def _json(self) -> dict[str, Any]:
        problem = asdict(self.workload) | {"shape": self.workload.shape_text}
        return {"problem": problem, "direction": self.problem.direction}


@dataclass(frozen=True)
class Failure(Case):
    """A plan that did not compile, and the compiler's message."""

    error: str

    def to_json(self) -> dict[str, Any]:
        """Return the failure as data for ``json.dumps``."""
        return self._json() | {"error": self.error}


@dataclass(frozen=True)
class Inspection(Case):
    """A compiled plan and the estimate of its time.

    ``bytes_minimum`` counts every tensor of the call once. ``bytes_moved`` is what the launches
    request from memory; ``estimate.dram_bytes`` is the part of it that L2 should not serve.
    """

    kernels: tuple[Kernel, ...]
    estimate: Estimate
    bytes_minimum: int
    bytes_moved: int

    @property
    def spill_bytes(self) -> int:
        """Bytes that a thread spills, in the kernel that spills most."""
        return max(kernel.spill_bytes for kernel in self.kernels)

    @property
    def registers(self) -> int:
        """Registers of a thread, in the kernel that takes most."""
        return max(kernel.registers for kernel in self.kernels)

    @property
    def converted_tiles(self) -> int:
        """Layout conversions of whole fragments in all kernels."""
        return sum(kernel.converted_tiles for kernel in self.kernels)

    @property
    def access_bytes(self) -> int:
        """Width of the narrowest access to a tensor of the input's size."""
        return min(
            size
            for kernel in self.kernels
            for name, size in kernel.access_bytes.items()
            if name in _ACTIVATIONS
        )

    @property
    def widest_access_bytes(self) -> int:
        """Upper bound of ``access_bytes`` for the shape and dtype."""
        return self.problem.vec * self.problem.itemsize

    @property
    def fits_one_program(self) -> bool:
        """True if some resident plan exists that reads as widely as any."""
        try:
            config = heuristic_plan(self.problem, self.device, ("resident",))
        except ValueError:
            return False
        return self.problem.access_bytes(config.tile.groups) == self.widest_access_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as data for ``json.dumps``; times are in microseconds."""
        return {
            "target": self.target,
            **self._json(),
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
        """Return a kernel as data, with its CTAs per multiprocessor and its waves."""
        ctas = _resident_ctas(kernel, self.device)
        waves = kernel.grid / (self.device.multiprocessors * ctas)
        return asdict(kernel) | {"ctas_per_multiprocessor": ctas, "waves": round(waves, 2)}


def inspect(
    workload: Workload, direction: str, target: str, config: Config | None = None
) -> Inspection:
    """Compile a plan of a workload for a target ("sm_90", "gfx942", ... of ``TARGETS``).

    The default config is the heuristic's for the target's GPU in ``TARGETS``: tables belong to GPUs
    that are present. The forward also writes the statistics that a backward needs.

    Raises:
        ValueError: the target is unknown.
    """
    gpu = gpu_named(target)
    problem = workload.problem(direction)
    config = config or heuristic_plan(problem, gpu)
    return Case(workload, problem, target, config).compile()


def gpu_named(target: str) -> Device:
    """Return the GPU that stands for a target of ``TARGETS``.

    Raises:
        ValueError: the target is unknown.
    """
    if target not in TARGETS:
        raise ValueError(f"the target must be one of {', '.join(TARGETS)}; got {target!r}.")
    return TARGETS[target]


def in_processes(function: Callable[[_S], _T], items: Sequence[_S], processes: int) -> Iterator[_T]:
    """Yield the function's results in order, computed by at most so many processes."""
    processes = min(processes, len(items))
    if processes <= 1:
        yield from map(function, items)
        return
    # spawned: a forked process could inherit the locks of PyTorch's threads
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        yield from pool.map(function, items)


def inspect_all(cases: Sequence[Case]) -> Iterator[Inspection | Failure]:
    """Compile the plans in order; several of them in processes."""
    return in_processes(_inspected, cases, max(2, os.cpu_count() or 1))


def _inspected(case: Case) -> Inspection | Failure:
    try:
        return case.compile()
    except Exception as error:  # the other plans are worth seeing
        return Failure(**vars(case), error=f"{type(error).__name__}: {error}")


def tracked(items: Iterable[_T], count: int, description: str) -> Iterable[_T]:
    """Yield the items, with a progress bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(items, description, total=count, console=console, transient=True, disable=hidden)


def launches_of(
    workload: Workload, problem: Problem, config: Config
) -> tuple[list[Tensor], list[Launch]]:
    """Return a call's tensors, without memory, and its launches; all gradients are asked for."""
    operands = workload.kernel_operands(workload.operands("meta"), problem.direction)
    x = operands.x
    present = [tensor for tensor in operands if tensor is not None]
    stats = launches.statistics(x, problem.n, problem.groups, 3)
    if problem.direction == "forward":
        y = layout.empty_like(x)
        described = launches.forward_launches(problem, config, operands, y, stats, 1e-5)
        return [*present, y, stats], described
    dy = layout.empty_like(x)
    grads = autograd.empty_gradients(operands, [tensor is not None for tensor in operands])
    described = launches.backward_launches(problem, config, dy, operands, stats, grads)
    return [*present, dy, stats, *grads.values()], described


def traffic(case: Case) -> tuple[int, int, int]:
    """Return the minimum, the moved and the estimated DRAM bytes of a plan, not compiled."""
    tensors, described = launches_of(case.workload, case.problem, case.config)
    moved = bytes_moved(described, case.problem, case.config)
    dram = estimate(case.problem, case.config, case.device).dram_bytes
    return sum(tensor.nbytes for tensor in tensors), moved, dram


def bytes_moved(described: Iterable[Launch], problem: Problem, config: Config) -> int:
    """Return the bytes that launches request from memory.

    L1 serves what a program requests again in a loop.
    """
    return sum(_launch_bytes(launch, problem, config) for launch in described)


def _launch_bytes(launch: Launch, problem: Problem, config: Config) -> int:
    rows = config.parts(problem) * config.splits  # each has programs of its own
    read_by_all = {"stats_ptr"} if problem.direction == "backward" else set()
    read_twice = set()
    if "apply" in launch.kernel.__name__:
        read_by_all.add("partials_ptr")
    elif "pipelined" in launch.kernel.__name__:
        read_twice = {"x_ptr", "dy_ptr"}
        if problem.direction == "backward":
            read_twice |= {"stats_ptr", *(f"{name}_ptr" for name in Operands._fields)}
    total = 0
    for name, tensor in pointers_of(launch):
        times = 2 if name in read_twice else 1
        if name.removesuffix("_ptr") in _PER_CHANNEL:
            times *= rows * problem.channels // tensor.numel()
        elif name in read_by_all:  # by the programs of a group
            times *= config.num_partials
        elif name == "partials_ptr" and read_twice:  # written once, read by all of the group
            times += config.num_partials
        total += times * tensor.nbytes
    return total


def _resident_ctas(kernel: Kernel, device: Device) -> int:
    return ctas_per_multiprocessor(device, kernel.num_warps, kernel.registers, kernel.shared_bytes)
