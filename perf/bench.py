"""Time GroupNorm by every provider, beside floors that move as many bytes and do nothing else.

An answer is checked against float64 before it is timed, and each time is on disk before the next
workload's is taken. Without a GPU, --predict writes what the model of triton_gn.plan expects.
"""

import argparse
import platform
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from perf import records
from perf.providers import PARTS, PROVIDERS, answers_of, bytes_minimum, checked, floor
from perf.records import DIRECTIONS, FIGURES, OURS, PREDICTED, REFERENCES, RESULTS, Record, case
from triton_gn.ops.device import gpu_of
from triton_gn.plan import (
    STRATEGIES,
    TARGETS,
    UNVERIFIED,
    Device,
    cost_model,
    estimate,
    fields_of,
    heuristic_plan,
)
from triton_gn.tools import stopwatch, tune, workloads
from triton_gn.tools.stopwatch import Call, Times
from triton_gn.tools.verify import Trial
from triton_gn.tools.workloads import Workload

WORKLOADS = Path(__file__).with_name("workloads.csv")
_ROOT = Path(__file__).parents[1]
CACHES = ("cold", "warm")
_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    file = "CSV with the columns of perf/workloads.csv (default: that file)"
    parser.add_argument("--workloads", type=Path, default=WORKLOADS, metavar="FILE", help=file)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--core", action="store_true", help="rows for every regime (default)")
    which.add_argument("--all", action="store_true", help="all rows: it takes hours")
    parser.add_argument("--match", default="", metavar="TEXT", help="in a name or in a shape")
    for flag, allowed in (
        ("providers", [one.name for one in PROVIDERS]),
        ("directions", DIRECTIONS),
        ("cache", CACHES),
    ):
        names = ",".join(allowed)
        parser.add_argument(f"--{flag}", default=names, metavar="A,B", help=f"default: {names}")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip what the day's file has of this commit (default)",
    )
    parser.add_argument("--predict", choices=TARGETS, help="no times but the model's estimates")
    add_out(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    """The flag for the folder of the results."""
    text = f"default: {RESULTS}/<GPU>; of predictions {PREDICTED}/<GPU>"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=text)


def run(options: argparse.Namespace, device: torch.device | None = None) -> int:
    """Bench as the flags say, on the current GPU unless given another device.

    Returns:
        The exit status: 0 well, 1 if triton_gn itself was wrong or failed, 130 after Ctrl-C.

    Raises:
        ValueError: the flags name nothing, or nothing can be timed here.
    """
    chosen = _chosen(options)
    if options.predict:
        return _predict(options, chosen, TARGETS[options.predict])
    device = device or current_gpu("python -m perf bench --predict sm_90")
    return Bench(options, device).run(chosen)


def current_gpu(remedy: str) -> torch.device:
    """The one to time on.

    Raises:
        ValueError: there is none, with a command that needs none.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "kernels are timed on a GPU, but torch.cuda.is_available() is False here. "
            f"Without one, there is `{remedy}`."
        )
    return torch.device("cuda", torch.cuda.current_device())


def _chosen(options: argparse.Namespace) -> list[Workload]:
    rows = workloads.read(options.workloads)
    chosen = [w for w in rows if (w.core or options.all) and matches(w, options.match)]
    if not chosen:
        which = "row" if options.all else "core row"
        raise ValueError(
            f"{options.workloads} has no {which} with {options.match!r}. "
            "Remedy: another --match, or --all."
        )
    return chosen


def matches(workload: Workload, text: str) -> bool:
    """Whether its name or its shape has a text."""
    return text.lower() in f"{workload.name} {workload.shape_text}".lower()


def listed(text: str, allowed: Iterable[str]) -> list[str]:
    """The names of "a,b", in the order of those that there are."""
    names, wanted = list(allowed), text.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"names must be of {', '.join(names)}; got {', '.join(unknown)}.")
    return [name for name in names if name in wanted]


def tracked(work: Iterable[_T], count: int, what: str) -> Iterable[_T]:
    """The same, with a bar and the time left on a terminal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(work, what, total=count, console=console, transient=True, disable=hidden)


class Bench:
    """A run on a device."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        gpu = gpu_of(device)
        self.device, self.base = device, origin("bench", gpu, measured=True)
        self.directions = listed(options.directions, DIRECTIONS)
        self.caches = listed(options.cache, CACHES)
        names = listed(options.providers, [one.name for one in PROVIDERS])
        wanted = {one: one.absent(device) for one in PROVIDERS if one.name in names}
        self.absent = {one.name: reason for one, reason in wanted.items() if reason}
        self.providers = [one for one, reason in wanted.items() if not reason]
        if not self.providers:
            raise ValueError(f"there must be a provider that can run here; got {self.absent}.")
        self.path = (options.out or records.folder_of(gpu.name, True)) / f"{now()[:10]}.jsonl"
        before = records.read(self.path) if options.resume and self.path.exists() else ()
        self.done = {_key(one) for one in before}

    def run(self, chosen: list[Workload]) -> int:
        """Measure what is missing, print it, and return the exit status."""
        for name, reason in self.absent.items():
            print(f"without {name}: {reason}", file=sys.stderr)
        cases = [(workload, direction) for workload in chosen for direction in self.directions]
        found: list[Record] = []
        interrupted = False
        try:
            for one_case in tracked(cases, len(cases), "timing"):
                for record in self.records_of(*one_case):
                    records.save(self.path, [record])
                    found.append(record)
        except KeyboardInterrupt:
            interrupted = True
            print("Interrupted: the same command goes on from here.", file=sys.stderr)
        report(found, self.path)
        return 130 if interrupted else int(any(r.skipped and r.provider == OURS for r in found))

    def records_of(self, workload: Workload, direction: str) -> Iterator[Record]:
        """Of a workload, unless the file has all of them; those of one run can be compared."""
        base = self.base | fields_of_workload(workload) | {"direction": direction}
        base |= {"bytes_minimum": bytes_minimum(workload, direction)}
        each = [(one.name, cache) for one in self.providers for cache in self.caches]
        if all(_key(Record(**base, provider=n, cache=c)) in self.done for n, c in each):
            return
        try:
            yield from self._timed(base, workload, direction)
        except torch.OutOfMemoryError:
            base |= {"skipped": "the GPU has no room for it beside its answer in float64"}
            for name, cache in each:
                yield Record(**base, provider=name, cache=cache, date=now())

    def _timed(self, base: dict[str, Any], workload: Workload, direction: str) -> Iterator[Record]:
        trial = Trial(workload, self.device)
        answers = answers_of(trial, direction)
        said: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        for one in self.providers:
            call, said[one.name] = checked(one, trial, direction, answers)
            if call is not None:
                calls[one.name] = call
                said[one.name]["peak_bytes"] = stopwatch.peak_bytes(call, self.device)
                if not one.is_fixed:  # to fix a part of the plan costs the host as well
                    said[one.name]["host_us"] = stopwatch.host_us(call)
        floors = {REFERENCES[part]: part for part in PARTS[direction]}
        for name, part in floors.items():
            said[name] = {"bytes_minimum": bytes_minimum(workload, part)}
            calls[name] = floor(part, said[name]["bytes_minimum"], self.device)
        for cache in self.caches:
            is_cold = cache == "cold"
            times = stopwatch.measure(list(calls.values()), self.device, cold=is_cold)
            of_each = dict(zip(calls, times, strict=True))
            floor_ms = sum(of_each[name].p50 for name in floors)
            for name, fields in said.items():
                timed = fields_of_times(of_each[name], is_cold) if name in of_each else {}
                if timed and name not in floors:
                    timed["share_of_copy"] = floor_ms / of_each[name].p50
                yield Record(**base | fields | timed, provider=name, cache=cache, date=now())


def _key(record: Record) -> tuple[Any, ...]:
    return case(record), record.provider, record.commit


def fields_of_workload(workload: Workload) -> dict[str, Any]:
    """As a record has them."""
    names = "groups", "dtype", "param_dtype", "layout", "activation", "fused"
    same = {name: getattr(workload, name) for name in names}
    return {"workload": workload.name, "shape": workload.shape_text} | same


def fields_of_times(times: Times, cold: bool) -> dict[str, Any]:
    """As a record has them."""
    protocol = stopwatch.protocol(cold)
    if not times.graphed:
        protocol += "; this call without a graph, so that the host's time may be in it"
    return {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80, "protocol": protocol}


def origin(command: str, device: Device, measured: bool) -> dict[str, Any]:
    """What all records of a run have in common."""
    known = tune.provenance()
    names = ("driver", "runtime", "torch", "triton", "triton_gn")
    versions = {name: known[name] for name in names if known[name]}
    return {
        "command": command,
        "measured": measured,
        "device": device.name,
        "versions": {"python": platform.python_version()} | versions,
        "commit": _commit(known["commit"]),
    }


def now() -> str:
    """Date and time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit(commit: str) -> str:
    """With "-dirty" where files of its checkout have changed, other than results and figures."""
    status = "git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no", "--"
    changed = commit and tune.output_of(*status, ".", f":!{RESULTS}", f":!{FIGURES}")
    return f"{commit}-dirty" if changed else commit


def _predict(options: argparse.Namespace, chosen: list[Workload], gpu: Device) -> int:
    base = origin("bench", gpu, measured=False)
    found = [
        record
        for workload in chosen
        for direction in listed(options.directions, DIRECTIONS)
        for record in predictions(base, workload, direction, gpu)
    ]
    path = (options.out or records.folder_of(gpu.name, False)) / "bench.jsonl"
    records.save(path, found, anew=True)
    report(found, path)
    return 0


def predictions(
    base: dict[str, Any], workload: Workload, direction: str, gpu: Device
) -> Iterator[Record]:
    """What the model expects of triton_gn, of each strategy that can run, and of the floors."""
    base = base | fields_of_workload(workload) | {"direction": direction, "date": now()}
    base |= {"protocol": "predicted by triton_gn.plan"}
    floor_us = 0.0
    for part in PARTS[direction]:
        count = bytes_minimum(workload, part)
        us, bound = cost_model.floor(count, gpu)
        floor_us += us
        yield Record(
            **base,
            provider=REFERENCES[part],
            ms_p50=us / 1e3,
            bytes_minimum=count,
            bound=bound,
        )
    base |= {"bytes_minimum": bytes_minimum(workload, direction)}
    problems = [workload.problem(part) for part in PARTS[direction]]
    for strategies in (STRATEGIES, *((one,) for one in STRATEGIES + UNVERIFIED)):
        try:
            configs = [heuristic_plan(problem, gpu, strategies) for problem in problems]
        except ValueError:
            continue  # the strategy cannot run
        times = [estimate(p, config, gpu) for p, config in zip(problems, configs, strict=True)]
        us = sum(one.us for one in times)
        yield Record(
            **base,
            provider=OURS if strategies == STRATEGIES else f"{OURS}[{strategies[0]}]",
            strategy=" + ".join(dict.fromkeys(config.strategy for config in configs)),
            config=fields_of(configs[0]) if len(configs) == 1 else None,
            ms_p50=us / 1e3,
            share_of_copy=floor_us / us,
            bound=max(times, key=lambda one: one.us).bound,
        )


def report(found: list[Record], path: Path) -> None:
    """Print the times of the first provider, and those of the others over them."""
    if not found:
        print(f"{path} has all of it already; --no-resume times it again.")
        return
    there = [one for one in PROVIDERS if any(record.provider == one.name for record in found)]
    peers = [one.name for one in there[1:] if not one.is_fixed]
    first, others = there[0].name, peers or [one.name for one in there[1:]]
    table = Table(
        title=found[0].device + ", predicted, not measured" * (not found[0].measured),
        caption=f"floor: of a copy (forward), an addition (backward) the time over {first}'s\n"
        f"right of it: of the others the time over {first}'s",
        box=SIMPLE_HEAD,
        expand=True,
        pad_edge=False,
    )
    table.add_column("workload", no_wrap=True, ratio=1)
    table.add_column("call, L2")
    for title in (f"{first}\nus", "floor", *(name.removeprefix(OURS) for name in others)):
        table.add_column(Text(title.replace("torch_", "torch\n")), justify="right")
    cases: dict[Any, dict[str, Record]] = {}
    for one in found:
        cases.setdefault(case(one), {})[one.provider] = one
    columns: list[list[float]] = [[] for _ in ("floor", *others)]
    for row in cases.values():
        one = row[first]
        ratios = [one.share_of_copy, *(_ratio(row.get(name), one) for name in others)]
        for column, ratio in zip(columns, ratios, strict=True):
            column += [ratio] if ratio else []
        words = ["", *(_word(row.get(name)) for name in others)]
        table.add_row(
            f"{one.shape} {one.workload}",
            f"{one.direction}, {one.cache}",
            f"{1e3 * one.ms_p50:.1f}" if one.ms_p50 else _word(one),
            *(f"{r:.2f}" if r else word for r, word in zip(ratios, words, strict=True)),
        )
    table.add_section()
    means = (f"{geometric_mean(column):.2f}" if column else "" for column in columns)
    table.add_row("geometric mean", "", "", *means)
    Console().print(table)
    print(f"{len(found)} records in {path}")


def _ratio(record: Record | None, first: Record) -> float | None:
    if record is None or not record.ms_p50 or not first.ms_p50:
        return None
    return record.ms_p50 / first.ms_p50


def _word(record: Record | None) -> str:
    """Why there is no time: it was wrong, it failed, or it cannot be tried."""
    reason, colon, _ = (record.skipped or "" if record else "").partition(":")
    return reason if colon else "-"
