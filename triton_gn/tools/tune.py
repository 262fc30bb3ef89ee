"""``python -m triton_gn tune``: time plans on this GPU and keep those that beat the rule.

For each problem, the plans that the model of ``triton_gn.plan`` holds for good are checked against
float64 and timed side by side, with a cold L2. The fastest of many is partly luck: so it races the
rule's own plan again, and is kept only where its median is shorter by more than the noise, which is
the widest of their ranges from the 20th to the 80th percentile.
"""

import argparse
import itertools
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils._pytree import tree_leaves

import triton_gn
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
from triton_gn.tools.stopwatch import Times
from triton_gn.tools.verify import Trial
from triton_gn.tools.workloads import DIRECTIONS, Workload

Stopwatch = Callable[..., Sequence[Times]]  # ``timing.measure``, or one with its signature

_SLOWDOWN = 3.0  # over the model's best, by the model: slower plans are not tried
_SAME_RUN = ("driver", "torch", "triton", "triton_gn")  # of a provenance: else timed again
_NO_GPU = """\
tune: kernels are timed on a GPU, but torch.cuda.is_available() is False here.
What the compiler and the model say of plans takes none, for the rule's own and for all of them:
  python -m triton_gn inspect --target sm_90 --shape 2x320x64x64 --groups 32
  python -m perf sweep --target sm_90 --shape 2x320x64x64 --groups 32
"""


class TuneError(Exception):
    """Why a problem cannot be tuned for."""


@dataclass(frozen=True)
class Result:
    """What came out for a problem."""

    name: str
    entry: Entry
    timed: int  # plans
    faults: Mapping[Config, str]  # of the plans that were not timed

    @property
    def plan(self) -> str:
        """The plan that is kept, by its fields."""
        config = self.entry.config
        return "the rule's" if config is None else " ".join(f"{k}={v}" for k, v in config.items())

    @property
    def gain(self) -> str:
        """How many times as fast as the rule's it is."""
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
    """The flags of ``python -m triton_gn tune``."""
    which = workloads.add_arguments(parser, direction="both")
    which.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="what a model's layers need: FACTORY() gives it and its arguments, a tuple or a dict",
    )
    parser.add_argument("--retune", action="store_true", help="time anew what the table has")
    parser.add_argument(
        "--candidates", type=int, default=24, metavar="N", help="plans to time, at most (24)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the user's cache")


def run(
    options: argparse.Namespace,
    device: torch.device | None = None,
    stopwatch: Stopwatch = stopwatch.measure,
) -> int:
    """Tune for what the flags name, and write each result to the GPU's table at once.

    Args:
        options: the flags of ``add_arguments``, parsed.
        device: the current GPU, unless given.
        stopwatch: what takes the times.

    Returns:
        The exit status: 0 if the table has all problems, 1 if some could not be tuned for, 2
        without a GPU, 130 after Ctrl-C, which leaves what was finished in the table.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the flags name nothing.
    """
    if device is None:
        if not torch.cuda.is_available():
            print(_NO_GPU, end="", file=sys.stderr)
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    gpu, origin, jobs = gpu_of(device), provenance(), _jobs(options)
    path = table.path_of(options.out or table.cache_folder(), gpu)
    for entry in merge(path, gpu, []):
        if not options.retune and all(entry.provenance.get(k) == origin[k] for k in _SAME_RUN):
            jobs.pop(entry.problem, None)
    tune_for = partial(
        tune, device=device, stopwatch=stopwatch, most=options.candidates, origin=origin
    )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{gpu.name}: {len(jobs)} problems to tune for, into {path}")
    results: list[Result] = []
    try:
        for result in _results(jobs, tune_for, console):
            merge(path, gpu, [result.entry])
            results.append(result)
            console.print(str(result))
    except KeyboardInterrupt:
        console.print(
            f"Interrupted: {len(results)} of {len(jobs)} problems are done, and in {path}. "
            "The same command, without --retune, goes on from there."
        )
        return 130
    console.print(_table(results))
    return 0 if len(results) == len(jobs) else 1


def _results(
    jobs: Mapping[Problem, Workload], tune_for: Callable[[Workload, str], Result], console: Console
) -> Iterator[Result]:
    """Of all problems that can be tuned for, under a bar that tells the time left."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        for problem, workload in progress.track(jobs.items(), description="tuning"):
            try:
                result = tune_for(workload, problem.direction)
            except (TuneError, torch.OutOfMemoryError) as error:
                console.print(f"{workload.name} {problem.direction}: not tuned: {error}")
            else:
                yield result


def _table(results: Iterable[Result]) -> Table:
    table = Table("problem", title="median us, cold (warm)")
    for column in ("rule", "best", "gain"):
        table.add_column(column, justify="right")
    table.add_column("plan")
    for one in results:
        entry = one.entry
        rule = f"{entry.default_us:.1f} ({entry.warm_default_us:.1f})"
        best = f"{entry.best_us:.1f} ({entry.warm_best_us:.1f})"
        table.add_row(one.name, rule, best, one.gain, one.plan)
    return table


def tune(
    workload: Workload,
    direction: str,
    device: torch.device,
    stopwatch: Stopwatch,
    most: int,
    origin: Mapping[str, str],
) -> Result:
    """Time at most so many plans of a problem and say which is the best.

    Args:
        workload: what poses the problem.
        direction: "forward" or "backward".
        device: a GPU.
        stopwatch: what takes the times.
        most: how many plans to time, the rule's own included.
        origin: ``provenance`` of the times.

    Raises:
        TuneError: the rule's own plan does not run or gives a wrong answer.
        torch.OutOfMemoryError: the operands, or their answer in float64, do not fit.
    """
    problem, trial, gpu = workload.problem(direction), Trial(workload, device), gpu_of(device)
    rule, *others = shortlist(problem, gpu, most)
    fault = _fault(trial, direction, rule, may_spill=True)
    if fault is not None:
        raise TuneError(f"the rule's own plan {fields_of(rule)} {fault}")
    faults = {config: fault for config in others if (fault := _fault(trial, direction, config))}

    def times(configs: Iterable[Config], cold: bool) -> Sequence[Times]:
        calls = [partial(trial.run, direction, config) for config in configs]
        return stopwatch(calls, device, cold=cold)

    right = [rule, *(config for config in others if config not in faults)]
    medians = [one.p50 for one in times(right, cold=True)]
    best = right[medians.index(min(medians))]
    finalists = list(dict.fromkeys((rule, best)))
    cold, warm = times(finalists, cold=True), times(finalists, cold=False)
    noise = max(one.p80 - one.p20 for one in cold)
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
    """At most so many plans to time: the rule's, then the best by the model of each strategy in
    turn, as long as they are not much slower than the best of all."""
    found = candidates(problem, gpu)
    us = [estimate(problem, config, gpu).us for config in found]
    near = [config for config, one in zip(found, us, strict=True) if one <= _SLOWDOWN * us[0]]
    by_strategy: dict[str, list[Config]] = {}
    for config in near:
        by_strategy.setdefault(config.strategy, []).append(config)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_strategy.values()))
    plans = (heuristic_plan(problem, gpu), *filter(None, in_turn))
    return list(dict.fromkeys(plans))[:most]


def _fault(trial: Trial, direction: str, config: Config, may_spill: bool = False) -> str | None:
    """Why not to time a plan; None if its answer is right."""
    try:
        wrong = trial.check(direction, config)
        spills = not may_spill and trial.spills(direction, config) > 0
    except Exception as error:  # whatever the compiler or the driver has against it
        return f"failed: {error}"
    if wrong is not None:
        return f"wrong: {wrong}"
    return "spilled" if spills else None


def merge(path: Path, gpu: Device, entries: Iterable[Entry]) -> list[Entry]:
    """Add entries to a table, in place of older ones of the same problems, and plan by it from now
    on; return all that it has.

    Whoever reads it sees a whole file at any time, and of several processes none loses what another
    has added. A file that is no table of this GPU is moved aside, to "<name>.refused".

    Raises:
        OSError: the folder or the file cannot be written.
        ValueError: the table would be larger than what is read.
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


def provenance() -> dict[str, str]:
    """Where times of this process come from."""
    package = Path(triton_gn.__file__).parent
    is_checkout = (package.parent / ".git").exists()  # and not some repository around site-packages
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "driver": driver.partition("\n")[0],
        "runtime": torch.version.cuda or torch.version.hip or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "triton_gn": triton_gn.__version__,
        "commit": output_of("git", "-C", str(package), "rev-parse", "HEAD") if is_checkout else "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": stopwatch.protocol(cold=True),
    }


def output_of(*command: str) -> str:
    """What a command prints; nothing where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _jobs(options: argparse.Namespace) -> dict[Problem, Workload]:
    """What to tune for, and what poses it."""
    if options.candidates < 2:
        raise ValueError(f"--candidates must be at least 2; got {options.candidates}.")
    pairs: Iterable[tuple[Workload, str]]
    if options.model is None:
        pairs = itertools.product(workloads.from_arguments(options), DIRECTIONS)
    else:
        pairs = [(_workload_of(problem), problem.direction) for problem in met_by(options.model)]
    wanted = workloads.directions_of(options)
    return {one.problem(direction): one for one, direction in pairs if direction in wanted}


def _workload_of(problem: Problem) -> Workload:
    """One with a single spatial size, which is the same to the kernels."""
    layout = "channels_last" if problem.channels_last else "contiguous"
    return Workload(
        f"{problem.n}x{problem.channels}x{problem.pixels}", problem.n, problem.channels,
        problem.groups, (problem.pixels,), problem.dtype, layout=layout,
        activation=problem.activation, fused=problem.fused,
    )  # fmt: skip


def met_by(factory: str) -> list[Problem]:
    """The problems that the kernels meet in a model's forward and, where its outputs can be
    differentiated, in its backward from their sum.

    Args:
        factory: "module:function", found from the current folder; without arguments it gives the
            model and its arguments, a tuple or a dict.

    Raises:
        ValueError: there is none, or its model runs no kernel.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = pkgutil.resolve_name(factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--model must be module:factory, to be imported from {os.getcwd()}; "
            f"got {factory!r} ({error})."
        ) from error
    model, arguments = make()
    with launcher.recording() as calls:
        y = model(**arguments) if isinstance(arguments, dict) else model(*arguments)
        outputs = [leaf for leaf in tree_leaves(y) if isinstance(leaf, torch.Tensor)]
        sums = [leaf.float().sum() for leaf in outputs if leaf.requires_grad]
        if sums:
            torch.stack(sums).sum().backward()
    problems = list(dict.fromkeys(call.problem for call in calls))
    if not problems:
        raise ValueError(
            f"--model: no kernel of triton_gn ran in the model of {factory}. Remedy: let it call "
            "triton_gn.convert(model), and put the model and its arguments on the GPU."
        )
    return problems
