"""Time plans on this GPU and keep those that beat the default config in a table.

For each problem, the configs that the cost model ranks highest are verified against float64 and
timed side by side with a cold L2. The fastest of many is partly luck, so it is timed once more
against the default config. It is kept only if its median is shorter by more than the noise: the
wider of the two ranges from the 20th to the 80th percentile.
"""

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from triton_gn.ops import launcher
from triton_gn.ops.device import gpu_of
from triton_gn.plan import (
    Config,
    Device,
    Problem,
    candidates,
    estimate,
    fields_of,
    heuristic_plan,
    table,
)
from triton_gn.plan.planner import forget_plans
from triton_gn.plan.table import Entry
from triton_gn.tools import stopwatch, workloads
from triton_gn.tools.model import made_by, problems_of
from triton_gn.tools.provenance import provenance
from triton_gn.tools.stopwatch import Times
from triton_gn.tools.verify import Verifier
from triton_gn.tools.workloads import Workload

Stopwatch = Callable[..., Sequence[Times]]  # ``stopwatch.measure``, or a stand-in for it

_SLOWDOWN = 3.0  # predicted time over the best prediction: slower plans are not tried
# provenance of a time that need not be taken again
_SAME_RUN = ("driver", "torch", "triton", "triton_gn")
_NO_GPU = """\
tune: kernels are timed on a GPU, but torch.cuda.is_available() is False here.
The default config and all candidates can be compiled and predicted without one:
  python -m triton_gn inspect --target sm_90 --shape 2x320x64x64 --groups 32
  python -m perf sweep --target sm_90 --shape 2x320x64x64 --groups 32
"""


class TuneError(Exception):
    """The reason why a problem cannot be tuned for."""


@dataclass(frozen=True)
class Result:
    """The outcome of tuning for a problem."""

    name: str
    entry: Entry
    timed: int  # number of plans
    faults: Mapping[Config, str]  # why the other plans were not timed

    @property
    def plan(self) -> str:
        """Fields of the config that is kept."""
        config = self.entry.config
        return "the default" if config is None else " ".join(f"{k}={v}" for k, v in config.items())

    @property
    def gain(self) -> str:
        """Speed-up over the default config."""
        return f"{self.entry.default_us / self.entry.best_us:.2f}x"

    def __str__(self) -> str:
        entry = self.entry
        kinds = Counter(fault.partition(":")[0] for fault in self.faults.values())
        dropped = "".join(f", {count} {kind}" for kind, count in kinds.items())
        wrong = (
            f"\n  {fields_of(config)} {fault}"
            for config, fault in self.faults.items()
            if fault.startswith("wrong")
        )
        return (
            f"{self.name}: default {entry.default_us:.1f} us, best {entry.best_us:.1f} us "
            f"({self.gain}), {self.plan} ({self.timed} timed{dropped})" + "".join(wrong)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``python -m triton_gn tune``."""
    source = workloads.add_arguments(parser, direction="both")
    source.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the layers of a model: FACTORY() returns it and its arguments, a tuple or a dict",
    )
    parser.add_argument(
        "--retune", action="store_true", help="time problems again that the table has"
    )
    parser.add_argument(
        "--candidates", type=int, default=24, metavar="N", help="most plans to time (24)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the user's cache")


def run(
    options: argparse.Namespace,
    device: torch.device | None = None,
    stopwatch: Stopwatch = stopwatch.measure,
) -> int:
    """Tune for the problems of the flags and write each result to the GPU's table at once.

    Args:
        options: the parsed flags of ``add_arguments``.
        device: the GPU; None for the current one.
        stopwatch: the function that takes the times.

    Returns:
        The exit status: 0 if the table has all problems, 1 if some could not be tuned for, 2
        without a GPU, 130 after Ctrl-C; finished problems stay in the table.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the flags name no problem.
    """
    if device is None:
        if not torch.cuda.is_available():
            print(_NO_GPU, end="", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    jobs = _jobs(options)
    folder = options.out or table.cache_folder()
    return _tune_all(jobs, device, stopwatch, options.candidates, folder, options.retune, None)


def tune_model(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    most: int,
    time_limit: float | None,
    stopwatch: Stopwatch = stopwatch.measure,
) -> int:
    """Tune for the problems of a model's step; see :func:`triton_gn.tune`."""
    if most < 2:
        raise ValueError(f"candidates must be at least 2; got {most}.")
    if not torch.cuda.is_available():
        raise ValueError(_NO_GPU.rstrip())
    device = torch.device("cuda", torch.cuda.current_device())
    jobs = {problem: _workload_of(problem) for problem in problems_of(model, args, kwargs)}
    folder = table.cache_folder()
    _tune_all(dict(jobs), device, stopwatch, most, folder, False, time_limit)
    gpu = gpu_of(device)
    known = {entry.problem for entry in merge(table.path_of(folder, gpu), gpu, [])}
    return len(known & jobs.keys())


def _tune_all(
    jobs: dict[Problem, Workload],
    device: torch.device,
    stopwatch: Stopwatch,
    most: int,
    folder: Path,
    retune: bool,
    time_limit: float | None,
) -> int:
    """Tune for the problems that the table does not have, print a report; return the status."""
    gpu, origin = gpu_of(device), provenance()
    path = table.path_of(folder, gpu)
    for entry in merge(path, gpu, []):
        if not retune and all(entry.provenance.get(k) == origin[k] for k in _SAME_RUN):
            jobs.pop(entry.problem, None)
    tune_for = partial(tune, device=device, stopwatch=stopwatch, most=most, origin=origin)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{gpu.name}: {len(jobs)} problems to tune for, into {path}")
    results: list[Result] = []
    try:
        for result in _results(jobs, tune_for, console, time_limit):
            merge(path, gpu, [result.entry])
            results.append(result)
            console.print(str(result))
    except KeyboardInterrupt:
        console.print(
            f"Interrupted: {len(results)} of {len(jobs)} problems are done, and in {path}. "
            "Run the same command without --retune to resume."
        )
        return 130
    console.print(_table(results))
    return 0 if len(results) == len(jobs) else 1


def _results(
    jobs: Mapping[Problem, Workload],
    tune_for: Callable[[Workload, Problem], Result],
    console: Console,
    time_limit: float | None,
) -> Iterator[Result]:
    """Yield the results of all problems that can be tuned for, under a progress bar.

    After ``time_limit`` seconds no further problem is begun.
    """
    start = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        for problem, workload in progress.track(jobs.items(), description="tuning"):
            if time_limit is not None and time.monotonic() - start > time_limit:
                console.print(f"Stopped after {time_limit:g} s. The same call goes on from here.")
                return
            try:
                result = tune_for(workload, problem)
            except (TuneError, torch.OutOfMemoryError) as error:
                console.print(f"{workload.name} {problem.direction}: not tuned: {error}")
            else:
                yield result


def _table(results: Iterable[Result]) -> Table:
    table = Table("problem", title="median us, cold (warm)")
    for column in ("default", "best", "gain"):
        table.add_column(column, justify="right")
    table.add_column("plan")
    for result in results:
        entry = result.entry
        default = f"{entry.default_us:.1f} ({entry.warm_default_us:.1f})"
        best = f"{entry.best_us:.1f} ({entry.warm_best_us:.1f})"
        table.add_row(result.name, default, best, result.gain, result.plan)
    return table


def tune(
    workload: Workload,
    problem: Problem,
    device: torch.device,
    stopwatch: Stopwatch,
    most: int,
    origin: Mapping[str, str],
) -> Result:
    """Time plans of a problem and return the best.

    Args:
        workload: a workload that has the problem.
        problem: the problem of its forward or backward.
        device: a GPU.
        stopwatch: the function that takes the times.
        most: the number of plans to time, the default config included.
        origin: ``provenance`` of the times.

    Raises:
        TuneError: the default config does not run or gives a wrong answer.
        torch.OutOfMemoryError: the operands, or their answer in float64, do not fit.
    """
    verifier, gpu, direction = Verifier(workload, device), gpu_of(device), problem.direction
    default, *others = shortlist(problem, gpu, most)
    fault = _fault(verifier, direction, default, may_spill=True)
    if fault is not None:
        raise TuneError(f"the default config {fields_of(default)} {fault}")
    faults = {config: fault for config in others if (fault := _fault(verifier, direction, config))}

    def times(configs: Iterable[Config], cold: bool) -> Sequence[Times]:
        calls = [partial(verifier.run, direction, config) for config in configs]
        return stopwatch(calls, device, cold=cold)

    right = [default, *(config for config in others if config not in faults)]
    medians = [time.p50 for time in times(right, cold=True)]
    best = right[medians.index(min(medians))]
    finalists = list(dict.fromkeys((default, best)))
    cold, warm = times(finalists, cold=True), times(finalists, cold=False)
    noise = max(time.p80 - time.p20 for time in cold)
    winner = min(range(len(cold)), key=lambda i: cold[i].p50)
    if cold[0].p50 - cold[winner].p50 <= noise:
        winner = 0
    kept = fields_of(finalists[winner]) if winner else None
    entry = Entry(
        problem, kept, 1e3 * cold[0].p50, 1e3 * cold[winner].p50, 1e3 * noise,
        1e3 * warm[0].p50, 1e3 * warm[winner].p50, origin,
    )  # fmt: skip
    return Result(f"{workload.name} {direction}", entry, len(right), faults)


def shortlist(problem: Problem, gpu: Device, most: int) -> list[Config]:
    """Return at most ``most`` plans to time: the default config, then the strategies in turn.

    Each strategy's plans are in the order of the cost model. Plans that it ranks far behind the
    best of all are left out.
    """
    ranked = candidates(problem, gpu)
    limit = _SLOWDOWN * estimate(problem, ranked[0], gpu).us
    by_strategy: dict[str, list[Config]] = {}
    for config in itertools.takewhile(lambda c: estimate(problem, c, gpu).us <= limit, ranked):
        by_strategy.setdefault(config.strategy, []).append(config)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_strategy.values()))
    plans = (heuristic_plan(problem, gpu), *filter(None, in_turn))
    return list(dict.fromkeys(plans))[:most]


def _fault(
    verifier: Verifier, direction: str, config: Config, may_spill: bool = False
) -> str | None:
    """Return why a plan is not timed; None if its answer is right."""
    try:
        fault = verifier.check(direction, config)
        spills = not may_spill and verifier.spills(direction, config) > 0
    except Exception as error:  # the compiler's or the driver's
        return f"failed: {error}"
    return fault or ("spilled" if spills else None)


def merge(path: Path, gpu: Device, entries: Iterable[Entry]) -> list[Entry]:
    """Add entries to a table, replacing those of the same problems; return all its entries.

    This process plans by the new table from then on. Readers always see a whole file, and no
    process loses the entries of another. A file that is no table of this GPU is renamed to
    "<name>.refused".

    Raises:
        OSError: the folder or the file cannot be written.
        ValueError: the table would be too large to be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        merged = {entry.problem: entry for entry in (*_entries_in(path, gpu), *entries)}
        text = table.text_of(gpu, merged.values())
        if len(text) > table.MAX_BYTES:
            raise ValueError(
                f"a table may have at most {table.MAX_BYTES} bytes; got {len(text)} for "
                f"{len(merged)} entries. Move {path} away to begin another."
            )
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    forget_plans()
    launcher.forget()
    return list(merged.values())


def _entries_in(path: Path, gpu: Device) -> list[Entry]:
    try:
        return table.read(path, gpu)
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        path.replace(path.with_name(f"{path.name}.refused"))
        return []


def _jobs(options: argparse.Namespace) -> dict[Problem, Workload]:
    """Return the problems to tune for, each with a workload that has it."""
    if options.candidates < 2:
        raise ValueError(f"--candidates must be at least 2; got {options.candidates}.")
    directions = workloads.directions_of(options)
    if options.model is not None:
        problems = problems_of(*made_by(options.model))
        return {p: _workload_of(p) for p in problems if p.direction in directions}
    chosen = workloads.from_arguments(options)
    return {w.problem(direction): w for w in chosen for direction in directions}


def _workload_of(problem: Problem) -> Workload:
    """Return a workload of one spatial size, which the kernels cannot tell from several."""
    layout = "channels_last" if problem.channels_last else "contiguous"
    return Workload(
        f"{problem.n}x{problem.channels}x{problem.pixels}", problem.n, problem.channels,
        problem.groups, (problem.pixels,), problem.dtype, layout=layout,
        activation=problem.activation, fused=problem.fused,
    )  # fmt: skip
