"""Time the plans of a problem on this GPU or, with --target, compile them for other GPUs.

Answers are checked against float64 before they are timed. Plans that are compiled for an absent GPU
get predicted times and are marked so. A repeated sweep replaces its file.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from perf import common, records
from perf.implementations import bytes_minimum, failure
from perf.records import OURS, Record, slug
from triton_gn.ops.device import gpu_of
from triton_gn.plan import (
    FIELDS,
    TARGETS,
    Config,
    Device,
    Problem,
    candidates,
    fields_of,
    heuristic_plan,
)
from triton_gn.tools import stopwatch, tune, workloads
from triton_gn.tools.inspection import Case, Failure, Inspection, inspect_all, tracked
from triton_gn.tools.verify import Verifier, fault_of
from triton_gn.tools.workloads import Workload

_SHOWN = 10

Results = dict[Config, dict[str, Any]]  # fields of each plan's record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    workloads.add_arguments(parser, direction="both")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="of --workloads, only names or shapes with it"
    )
    parser.add_argument("--candidates", type=int, metavar="N", help="most plans of a problem")
    targets = ",".join(TARGETS)
    parser.add_argument("--target", metavar="A,B", help=f"compile for other GPUs, of {targets}")
    common.add_out(parser)


@dataclass(frozen=True)
class Sweep:
    """The plans of a problem on a GPU; ``target`` is empty if they are timed."""

    workload: Workload
    problem: Problem
    gpu: Device
    target: str
    plans: tuple[Config, ...]

    @property
    def cases(self) -> list[Case]:
        """The plans as cases to compile."""
        return [Case(self.workload, self.problem, self.target, plan) for plan in self.plans]

    def records(self, results: Results) -> list[Record]:
        """Return the results of the plans as records."""
        direction = self.problem.direction
        base = common.origin("sweep", self.gpu, measured=not self.target)
        base |= common.fields_of_workload(self.workload) | {"direction": direction}
        base |= {"bytes_minimum": bytes_minimum(self.workload, direction)}
        default = heuristic_plan(self.problem, self.gpu)
        return [
            Record(
                **base | fields,
                implementation=f"{OURS}[{plan.strategy}]",
                strategy=plan.strategy,
                config=fields_of(plan) | ({"default": True} if plan == default else {}),
                date=common.now(),
            )
            for plan, fields in results.items()
        ]

    def __str__(self) -> str:
        w = self.workload
        words = w.shape_text, f"g{w.groups}", w.dtype, w.param_dtype, w.layout, w.activation
        return " ".join(("sweep", self.target, *words, *w.fused, self.problem.direction))


def run(options: argparse.Namespace, device: torch.device | None = None) -> int:
    """Sweep on a device, by default the current GPU, or compile for the targets.

    Returns:
        The exit status: 0 well, 1 if a default config is wrong or fails or a problem is too large.

    Raises:
        ValueError: the flags name nothing, or nothing can be timed here.
    """
    if options.candidates is not None and options.candidates < 1:
        raise ValueError(f"--candidates must be at least 1; got {options.candidates}.")
    chosen = [w for w in workloads.from_arguments(options) if common.matches(w, options.match)]
    if not chosen:
        raise ValueError(f"no name and no shape has {options.match!r}. Remedy: another --match.")
    if options.target:
        targets = {name: TARGETS[name] for name in common.listed(options.target, TARGETS)}
    else:
        device = device or common.current_gpu("python -m perf sweep --target sm_90")
        targets = {"": gpu_of(device)}
    sweeps = [
        Sweep(workload, problem, gpu, target, tuple(_plans(problem, gpu, options.candidates)))
        for target, gpu in targets.items()
        for workload in chosen
        for problem in map(workload.problem, workloads.directions_of(options))
    ]
    if device is None:
        compiled = inspect_all([case for sweep in sweeps for case in sweep.cases])
        return _sweep(sweeps, options, partial(compile_all, compiled))
    return _sweep(sweeps, options, partial(time_all, device))


def _plans(problem: Problem, gpu: Device, most: int | None) -> list[Config]:
    return candidates(problem, gpu) if most is None else tune.shortlist(problem, gpu, most)


def _sweep(
    sweeps: Sequence[Sweep], options: argparse.Namespace, results_of: Callable[[Sweep], Results]
) -> int:
    status = 0
    for sweep in sweeps:
        try:
            results = results_of(sweep)
        except torch.OutOfMemoryError:
            print(f"{sweep}: {common.NO_ROOM}\n")
            status = 1
            continue
        rows = sweep.records(results)
        folder = options.out or records.folder_of(sweep.gpu.name, not sweep.target)
        path = folder / f"{slug(str(sweep))}.jsonl"
        records.save(path, rows, anew=True)
        report(rows)
        print(f"{len(rows)} records in {path}\n")
        status |= any(row.skipped is not None and _is_default(row) for row in rows)
    return int(status)


def compile_all(compiled: Iterator[Inspection | Failure], sweep: Sweep) -> Results:
    """Take the results of a sweep's plans from those of all sweeps, in order."""
    count = len(sweep.plans)
    description = f"compiling for {sweep.target}"
    results = tracked(itertools.islice(compiled, count), count, description)
    return {result.config: _predicted(result) for result in results}


def _predicted(result: Inspection | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"skipped": f"failed: {result.error}".splitlines()[0]}
    return {
        "ms_p50": result.estimate.us / 1e3,
        "bound": result.estimate.bound,
        "registers": result.registers,
        "spill_bytes": result.spill_bytes,
        "protocol": "compiled, times predicted by triton_gn.plan",
    }


def time_all(device: torch.device, sweep: Sweep) -> Results:
    """Verify the plans, then time the right ones in turn."""
    verifier, direction = Verifier(sweep.workload, device), sweep.problem.direction
    plans = tracked(sweep.plans, len(sweep.plans), "checking")
    results = {plan: _verified(verifier, direction, plan) for plan in plans}
    right = [plan for plan, fields in results.items() if "skipped" not in fields]
    calls = [partial(verifier.run, direction, plan) for plan in right]
    times = stopwatch.measure(calls, device, cold=True) if calls else []
    for plan, time in zip(right, times, strict=True):
        results[plan] |= common.fields_of_times(time, cold=True)
    return results


def _verified(verifier: Verifier, direction: str, plan: Config) -> dict[str, Any]:
    try:
        errors = verifier.errors(direction, plan)
        spilled = 4 * verifier.spills(direction, plan)
    except Exception as error:  # the compiler's or the driver's
        return {"skipped": failure(error)}
    fault = fault_of(errors, verifier.outputs(direction), verifier.operands.x)
    if fault is not None:
        return {"skipped": fault}
    return {"error": max(errors.values()), "spill_bytes": spilled}


def _is_default(record: Record) -> bool:
    return "default" in (record.config or {})


def report(rows: Sequence[Record]) -> None:
    """Print the best plans and the default config, and how many plans have no time."""
    head = rows[0]
    fused = "".join(f" + {name}" for name in head.fused)
    predicted = ", predicted, not measured" * (not head.measured)
    settings = [name for name in FIELDS if name not in ("strategy", "rows", "cols")]
    table = common.table(
        ["", "strategy"],
        ["tile", *(name.replace("_", "\n") for name in settings), "us", "regs"],
        title=f"{head.direction} of {head.shape}, {head.groups} groups, {head.dtype}, "
        f"{head.layout}, {head.activation}{fused}\n{head.device}{predicted}",
        caption="*: the default config",
        padding=0,
    )
    table.add_column("bound")
    timed = sorted((row for row in rows if row.ms_p50), key=lambda row: row.ms_p50 or 0)
    for rank, row in enumerate(timed, 1):
        if rank <= _SHOWN or _is_default(row):
            config = row.config or {}
            mark, tile = f"{rank}{'*' * _is_default(row)}", f"{config['rows']}x{config['cols']}"
            numbers = (str(config.get(name, "")) for name in settings)
            us, registers = f"{1e3 * (row.ms_p50 or 0):.2f}", str(row.registers or "")
            if row.spill_bytes:
                registers += f" and {row.spill_bytes} B spilled"
            table.add_row(mark, str(row.strategy), tile, *numbers, us, registers, row.bound or "")
    Console().print(table)
    for reason, count in Counter(row.skipped for row in rows if row.skipped).items():
        print(f"{count} of {len(rows)} plans {reason}")
