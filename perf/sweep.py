"""Look at the plans of a problem: time them on this GPU or, with --target, compile them for others.

A plan's answer is checked against float64 before it is timed. What is compiled for a GPU that is
not here gets an estimated time, and is marked as predicted. The same sweep replaces its file.
"""

import argparse
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from perf import bench, records
from perf.providers import bytes_minimum, failure
from perf.records import OURS, Record, slug
from triton_gn.ops.device import gpu_of
from triton_gn.plan import FIELDS, TARGETS, Config, Device, candidates, fields_of, heuristic_plan
from triton_gn.tools import stopwatch, tune, workloads
from triton_gn.tools.inspect import inspect
from triton_gn.tools.verify import Trial, error_of
from triton_gn.tools.workloads import Workload

_SHOWN = 10

Said = Mapping[Config, dict[str, Any]]  # of each plan some fields of its record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    workloads.add_arguments(parser, direction="both")
    parser.add_argument("--match", default="", metavar="TEXT", help="of --workloads, only with it")
    parser.add_argument("--candidates", type=int, metavar="N", help="at most so many plans")
    targets = ",".join(TARGETS)
    parser.add_argument("--target", metavar="A,B", help=f"compile for other GPUs, of {targets}")
    bench.add_out(parser)


@dataclass(frozen=True)
class Sweep:
    """The plans of a problem on a GPU; ``target`` is empty where they are timed."""

    workload: Workload
    direction: str
    gpu: Device
    target: str = ""

    def plans(self, most: int | None) -> list[Config]:
        """All that a search may try, or the most promising."""
        problem = self.workload.problem(self.direction)
        if most is None:
            return candidates(problem, self.gpu)
        return tune.shortlist(problem, self.gpu, most)

    def records(self, said: Said) -> list[Record]:
        """What was said of the plans, as records."""
        common = bench.origin("sweep", self.gpu, measured=not self.target)
        common |= bench.fields_of_workload(self.workload) | {"direction": self.direction}
        common |= {"bytes_minimum": bytes_minimum(self.workload, self.direction)}
        rule = heuristic_plan(self.workload.problem(self.direction), self.gpu)
        return [
            Record(
                **common | fields,
                provider=f"{OURS}[{plan.strategy}]",
                strategy=plan.strategy,
                config=fields_of(plan) | ({"rule": True} if plan == rule else {}),
                date=bench.now(),
            )
            for plan, fields in said.items()
        ]

    def __str__(self) -> str:
        one = self.workload
        words = one.shape_text, f"g{one.groups}", one.dtype, one.param_dtype, one.layout
        return " ".join(("sweep", self.target, *words, one.activation, *one.fused, self.direction))


def run(options: argparse.Namespace, device: torch.device | None = None) -> int:
    """Sweep as the flags say, on the current GPU unless given another device.

    Returns:
        The exit status: 0 well, 1 if the rule's own plan is wrong or fails or a problem is too
        large.

    Raises:
        ValueError: the flags name nothing, or nothing can be timed here.
    """
    if options.candidates is not None and options.candidates < 1:
        raise ValueError(f"--candidates must be at least 1; got {options.candidates}.")
    chosen = [w for w in workloads.from_arguments(options) if bench.matches(w, options.match)]
    if not chosen:
        raise ValueError(f"no name and no shape has {options.match!r}. Remedy: another --match.")
    cases = [(one, direction) for one in chosen for direction in workloads.directions_of(options)]
    if options.target:
        targets = bench.listed(options.target, TARGETS)
        sweeps = [Sweep(*case, TARGETS[target], target) for target in targets for case in cases]
        with compilers() as pool:
            return _sweep(sweeps, options, partial(compile_all, pool))
    device = device or bench.current_gpu("python -m perf sweep --target sm_90")
    sweeps = [Sweep(*case, gpu_of(device)) for case in cases]
    return _sweep(sweeps, options, partial(time_all, device))


def _sweep(
    sweeps: Sequence[Sweep],
    options: argparse.Namespace,
    look: Callable[[Sweep, Sequence[Config]], Said],
) -> int:
    status = 0
    for sweep in sweeps:
        try:
            said = look(sweep, sweep.plans(options.candidates))
        except torch.OutOfMemoryError:
            print(f"{sweep}: the GPU has no room for it beside its answer in float64\n")
            status = 1
            continue
        found = sweep.records(said)
        folder = options.out or records.folder_of(sweep.gpu.name, not sweep.target)
        path = folder / f"{slug(str(sweep))}.jsonl"
        records.save(path, found, anew=True)
        report(found)
        print(f"{len(found)} records in {path}\n")
        status |= any(one.skipped is not None and _is_rule(one) for one in found)
    return int(status)


def compilers() -> ProcessPoolExecutor:
    """Processes that compile, to be closed after use."""
    # spawned: a forked process could inherit the locks of PyTorch's threads
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(2, os.cpu_count() or 1), spawn)


def compile_all(pool: Executor, sweep: Sweep, plans: Sequence[Config]) -> Said:
    """What compiling says of plans."""
    compiled = pool.map(partial(_compiled, sweep), plans)
    said = bench.tracked(compiled, len(plans), f"compiling for {sweep.target}")
    return dict(zip(plans, said, strict=True))


def _compiled(sweep: Sweep, plan: Config) -> dict[str, Any]:
    try:
        one = inspect(sweep.workload, sweep.direction, sweep.target, plan)
    except Exception as error:  # whatever the compiler has against it
        return {"skipped": failure(error)}
    return {
        "ms_p50": one.estimate.us / 1e3,
        "bound": one.estimate.bound,
        "registers": one.registers,
        "spill_bytes": one.spill_bytes,
        "protocol": "compiled, times predicted by triton_gn.plan",
    }


def time_all(device: torch.device, sweep: Sweep, plans: Sequence[Config]) -> Said:
    """What running says of plans: the right ones are timed in turn."""
    trial = Trial(sweep.workload, device)
    checked = (_checked(trial, sweep.direction, plan) for plan in plans)
    said = dict(zip(plans, bench.tracked(checked, len(plans), "checking"), strict=True))
    right = [plan for plan in plans if "skipped" not in said[plan]]
    calls = [partial(trial.run, sweep.direction, plan) for plan in right]
    times = stopwatch.measure(calls, device, cold=True) if calls else []
    for plan, one in zip(right, times, strict=True):
        said[plan] |= bench.fields_of_times(one, cold=True)
    return said


def _checked(trial: Trial, direction: str, plan: Config) -> dict[str, Any]:
    try:
        fault = trial.check(direction, plan)
        spilled = 4 * trial.spills(direction, plan)
    except Exception as error:  # whatever the compiler or the driver has against it
        return {"skipped": failure(error)}
    if fault:
        return {"skipped": f"wrong: {fault}"}
    error_of_plan = error_of(trial.outputs(direction), trial.expected(direction))
    return {"error": error_of_plan, "spill_bytes": spilled}


def _is_rule(record: Record) -> bool:
    return "rule" in (record.config or {})


def report(found: Sequence[Record]) -> None:
    """Print the best plans and the rule's own, and how many have no time."""
    one = found[0]
    fused = "".join(f" + {name}" for name in one.fused)
    table = Table(
        title=f"{one.direction} of {one.shape}, {one.groups} groups, {one.dtype}, {one.layout}, "
        f"{one.activation}{fused}\n{one.device}" + ", predicted, not measured" * (not one.measured),
        caption="*: the rule's own",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    settings = [name for name in FIELDS if name not in ("strategy", "rows", "cols")]
    table.add_column("")
    table.add_column("strategy")
    titles = "tile", *(name.replace("_", "\n") for name in settings), "us", "regs"
    for title in titles:
        table.add_column(title, justify="right")
    table.add_column("bound")
    timed = sorted((one for one in found if one.ms_p50), key=lambda one: one.ms_p50 or 0)
    for rank, one in enumerate(timed, 1):
        if rank <= _SHOWN or _is_rule(one):
            config = one.config or {}
            mark, tile = f"{rank}{'*' * _is_rule(one)}", f"{config['rows']}x{config['cols']}"
            numbers = (str(config.get(name, "")) for name in settings)
            us, registers = f"{1e3 * (one.ms_p50 or 0):.2f}", str(one.registers or "")
            if one.spill_bytes:
                registers += f" and {one.spill_bytes} B spilled"
            table.add_row(mark, str(one.strategy), tile, *numbers, us, registers, one.bound or "")
    Console().print(table)
    for reason, count in Counter(one.skipped for one in found if one.skipped).items():
        print(f"{count} of {len(found)} plans {reason}")
