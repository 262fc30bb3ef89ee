"""Time all implementations of GroupNorm, beside copies and additions of as many bytes.

Answers are checked against float64 before they are timed. Each time is saved before the next
workload starts, so that a run can be interrupted and resumed. Without a GPU, --predict writes the
estimates of triton_gn.plan instead.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console

from perf import common, records
from perf.implementations import IMPLEMENTATIONS, PARTS, bytes_minimum, checked, speed_of_light
from perf.records import DIRECTIONS, OURS, REFERENCES, Record, case
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
from triton_gn.tools import stopwatch, workloads
from triton_gn.tools.inspection import tracked
from triton_gn.tools.stopwatch import Call
from triton_gn.tools.verify import Verifier
from triton_gn.tools.workloads import Workload

CACHES = ("cold", "warm")
NAMES = [one.name for one in IMPLEMENTATIONS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    file = "CSV with the columns of perf/workloads.csv (default: that file)"
    parser.add_argument(
        "--workloads", type=Path, default=common.WORKLOADS, metavar="FILE", help=file
    )
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--core", action="store_true", help="rows for every regime (default)")
    rows.add_argument("--all", action="store_true", help="all rows: it takes hours")
    parser.add_argument("--match", default="", metavar="TEXT", help="only names or shapes with it")
    choices = {"implementations": NAMES, "directions": DIRECTIONS, "cache": CACHES}
    for flag, allowed in choices.items():
        names = ",".join(allowed)
        parser.add_argument(f"--{flag}", default=names, metavar="A,B", help=f"default: {names}")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip what the day's file has of this commit (default)",
    )
    parser.add_argument("--predict", choices=TARGETS, help="write estimates instead of times")
    common.add_out(parser)


def run(options: argparse.Namespace, device: torch.device | None = None) -> int:
    """Run the benchmark on a device, by default the current GPU.

    Returns:
        The exit status: 0 well, 1 if triton_gn itself was wrong or failed, 130 after Ctrl-C.

    Raises:
        ValueError: the flags name nothing, or nothing can be timed here.
    """
    chosen = _chosen(options)
    if options.predict:
        return _predict(options, chosen, TARGETS[options.predict])
    device = device or common.current_gpu("python -m perf bench --predict sm_90")
    return Bench(options, device).run(chosen)


def _chosen(options: argparse.Namespace) -> list[Workload]:
    rows = workloads.read(options.workloads)
    chosen = [w for w in rows if (w.core or options.all) and common.matches(w, options.match)]
    if not chosen:
        row = "row" if options.all else "core row"
        raise ValueError(
            f"{options.workloads} has no {row} with {options.match!r}. "
            "Remedy: another --match, or --all."
        )
    return chosen


class Bench:
    """A run of the benchmark on a device."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        gpu = gpu_of(device)
        self.device, self.base = device, common.origin("bench", gpu, measured=True)
        self.directions = common.listed(options.directions, DIRECTIONS)
        self.caches = common.listed(options.cache, CACHES)
        names = common.listed(options.implementations, NAMES)
        reasons = {one: one.absent(device) for one in IMPLEMENTATIONS if one.name in names}
        self.absent = {one.name: reason for one, reason in reasons.items() if reason}
        self.implementations = [one for one, reason in reasons.items() if not reason]
        if not self.implementations:
            raise ValueError(
                f"there must be an implementation that can run here; got {self.absent}."
            )
        folder = options.out or records.folder_of(gpu.name, True)
        self.path = folder / f"{common.now()[:10]}.jsonl"
        earlier = records.read(self.path) if options.resume and self.path.exists() else ()
        self.done = {_key(record) for record in earlier}

    def run(self, chosen: list[Workload]) -> int:
        """Measure what is missing, print it, and return the exit status."""
        for name, reason in self.absent.items():
            print(f"without {name}: {reason}", file=sys.stderr)
        cases = [(workload, direction) for workload in chosen for direction in self.directions]
        new: list[Record] = []
        status = 0
        try:
            for workload, direction in tracked(cases, len(cases), "timing"):
                for record in self.records_of(workload, direction):
                    records.save(self.path, [record])
                    new.append(record)
                    status |= record.skipped is not None and record.implementation == OURS
        except KeyboardInterrupt:
            status = common.interrupted()
        report(new, self.path)
        return int(status)

    def records_of(self, workload: Workload, direction: str) -> Iterator[Record]:
        """Yield the records of a workload, timed in one run; none if the file has them all."""
        base = self.base | common.fields_of_workload(workload) | {"direction": direction}
        base |= {"bytes_minimum": bytes_minimum(workload, direction)}
        pairs = [(one.name, cache) for one in self.implementations for cache in self.caches]
        if all(_key(Record(**base, implementation=n, cache=c)) in self.done for n, c in pairs):
            return
        try:
            yield from self._timed(base, workload, direction)
        except torch.OutOfMemoryError:
            base |= {"skipped": common.NO_ROOM}
            for name, cache in pairs:
                yield Record(**base, implementation=name, cache=cache, date=common.now())

    def _timed(self, base: dict[str, Any], workload: Workload, direction: str) -> Iterator[Record]:
        verifier = Verifier(workload, self.device)
        fields: dict[str, dict[str, Any]] = {}
        calls: dict[str, Call] = {}
        for one in self.implementations:
            call, fields[one.name] = checked(one, verifier, direction)
            if call is not None:
                calls[one.name] = call
                fields[one.name]["peak_bytes"] = stopwatch.peak_bytes(call, self.device)
                if not one.is_fixed:  # plan_override costs host time too
                    fields[one.name]["host_us"] = stopwatch.host_us(call)
        references = {REFERENCES[part]: part for part in PARTS[direction]}
        for name, part in references.items():
            count = bytes_minimum(workload, part)
            fields[name] = {"bytes_minimum": count}
            calls[name] = speed_of_light(part, count, self.device)
        for cache in self.caches:
            cold = cache == "cold"
            times = stopwatch.measure(list(calls.values()), self.device, cold=cold)
            time_of = dict(zip(calls, times, strict=True))
            light_ms = sum(time_of[name].p50 for name in references)
            for name, known in fields.items():
                timed = common.fields_of_times(time_of[name], cold) if name in time_of else {}
                if timed and name not in references:
                    timed["share_of_copy"] = light_ms / time_of[name].p50
                values = base | known | timed
                yield Record(**values, implementation=name, cache=cache, date=common.now())


def _key(record: Record) -> tuple[Any, ...]:
    return case(record), record.implementation, record.commit


def _predict(options: argparse.Namespace, chosen: list[Workload], gpu: Device) -> int:
    base = common.origin("bench", gpu, measured=False)
    predicted = [
        record
        for workload in chosen
        for direction in common.listed(options.directions, DIRECTIONS)
        for record in predictions(base, workload, direction, gpu)
    ]
    path = (options.out or records.folder_of(gpu.name, False)) / "bench.jsonl"
    records.save(path, predicted, anew=True)
    report(predicted, path)
    return 0


def predictions(
    base: dict[str, Any], workload: Workload, direction: str, gpu: Device
) -> Iterator[Record]:
    """Yield estimates for the speed of light, triton_gn, and each strategy that can run."""
    base = base | common.fields_of_workload(workload) | {"direction": direction}
    base |= {"date": common.now(), "protocol": "predicted by triton_gn.plan"}
    light_us = 0.0
    for part in PARTS[direction]:
        count = bytes_minimum(workload, part)
        us, bound = cost_model.speed_of_light(count, gpu)
        light_us += us
        fields = {"ms_p50": us / 1e3, "bytes_minimum": count, "bound": bound}
        yield Record(**base | fields, implementation=REFERENCES[part])
    base |= {"bytes_minimum": bytes_minimum(workload, direction)}
    problems = [workload.problem(part) for part in PARTS[direction]]
    for strategies in (STRATEGIES, *((one,) for one in STRATEGIES + UNVERIFIED)):
        try:
            configs = [heuristic_plan(problem, gpu, strategies) for problem in problems]
        except ValueError:
            continue  # the strategy cannot run
        estimates = [estimate(p, c, gpu) for p, c in zip(problems, configs, strict=True)]
        us = sum(one.us for one in estimates)
        yield Record(
            **base,
            implementation=OURS if strategies == STRATEGIES else f"{OURS}[{strategies[0]}]",
            strategy=" + ".join(dict.fromkeys(config.strategy for config in configs)),
            config=fields_of(configs[0]) if len(configs) == 1 else None,
            ms_p50=us / 1e3,
            share_of_copy=light_us / us,
            bound=max(estimates, key=lambda one: one.us).bound,
        )


def report(new: list[Record], path: Path) -> None:
    """Print the times of the first implementation and the ratios of the others to it."""
    if not new:
        print(f"{path} has all of it already; --no-resume times it again.")
        return
    names = {record.implementation for record in new}
    present = [one for one in IMPLEMENTATIONS if one.name in names]
    peers = [one.name for one in present[1:] if not one.is_fixed]
    first, others = present[0].name, peers or [one.name for one in present[1:]]
    titles = [f"{first}\nus", "speed\nof light", *(name.removeprefix(OURS) for name in others)]
    table = common.table(
        ["workload", "call, L2"],
        [title.replace("torch_", "torch\n") for title in titles],
        title=new[0].device + ", predicted, not measured" * (not new[0].measured),
        caption="speed of light: time of a copy (forward) or an addition (backward) over "
        f"{first}'s\n"
        f"right of it: time of the others over {first}'s",
        show_edge=True,
        expand=True,
        pad_edge=False,
    )
    table.columns[0].no_wrap, table.columns[0].ratio = True, 1
    rows: dict[Any, dict[str, Record]] = {}
    for record in new:
        rows.setdefault(case(record), {})[record.implementation] = record
    columns: list[list[float]] = [[] for _ in ("speed of light", *others)]
    for row in rows.values():
        ours = row[first]
        ratios = [ours.share_of_copy, *(_ratio(row.get(name), ours) for name in others)]
        for column, ratio in zip(columns, ratios, strict=True):
            column += [ratio] if ratio else []
        words = ["", *(_word(row.get(name)) for name in others)]
        table.add_row(
            f"{ours.shape} {ours.workload}",
            f"{ours.direction}, {ours.cache}",
            f"{1e3 * ours.ms_p50:.1f}" if ours.ms_p50 else _word(ours),
            *(f"{r:.2f}" if r else word for r, word in zip(ratios, words, strict=True)),
        )
    table.add_section()
    means = (f"{geometric_mean(column):.2f}" if column else "" for column in columns)
    table.add_row("geometric mean", "", "", *means)
    Console().print(table)
    print(f"{len(new)} records in {path}")


def _ratio(record: Record | None, first: Record) -> float | None:
    if record is None or not record.ms_p50 or not first.ms_p50:
        return None
    return record.ms_p50 / first.ms_p50


def _word(record: Record | None) -> str:
    """Return why there is no time: wrong or failed; "-" if the implementation was not tried."""
    reason, colon, _ = (record.skipped or "" if record else "").partition(":")
    return reason if colon else "-"
