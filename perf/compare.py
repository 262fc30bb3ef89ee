"""Compare the times of two results files or folders, or of two git revisions on this GPU.

A difference counts if the ranges of the middle 60 % of the rounds do not overlap.
"""

import argparse
import math
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from rich.console import Console
from rich.text import Text

from perf import common, records
from perf.records import Record, case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("old", nargs="?", type=Path, metavar="OLD", help="results file or folder")
    parser.add_argument("new", nargs="?", type=Path, metavar="NEW", help="the other")
    parser.add_argument(
        "--revisions", nargs=2, metavar=("OLD", "NEW"), help="two git revisions to time in turn"
    )
    flags = "of `python -m perf bench`, for --revisions: --bench='--match LTX --cache cold'"
    parser.add_argument("--bench", default="", metavar="FLAGS", help=flags)
    parser.add_argument(
        "--fail-over", type=float, default=math.inf, metavar="RATIO",
        help="exit with 1 if a slower call takes more than this many times as long",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Compare two results or two revisions.

    Returns:
        The exit status: 0 well, 1 if a call has become slower by more than --fail-over.

    Raises:
        ValueError: there is nothing to compare.
    """
    if options.revisions:
        common.current_gpu("python -m perf compare OLD NEW")
        with tempfile.TemporaryDirectory() as folder:
            flags = shlex.split(options.bench)
            pairs = paired(*time_revisions(options.revisions, flags, Path(folder)))
    elif options.new is None:
        raise ValueError("there must be two results, OLD and NEW, or --revisions OLD NEW.")
    else:
        pairs = paired(records.read(options.old), records.read(options.new))
    if not pairs:
        raise ValueError("the two have no call in common: nothing can be compared.")
    report(pairs)
    return int(any(p.verdict == "slower" and p.ratio > options.fail_over for p in pairs))


@dataclass(frozen=True)
class Pair:
    """The old and the new time of a call."""

    old: Record
    new: Record

    @property
    def ratio(self) -> float:
        """New time over old time."""
        return (self.new.ms_p50 or 0) / (self.old.ms_p50 or 0)

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" if the difference exceeds the noise, else empty."""
        (old_low, old_high), (new_low, new_high) = spread(self.old), spread(self.new)
        if new_low > old_high:
            return "slower"
        return "faster" if new_high < old_low else ""


def spread(record: Record) -> tuple[float, float]:
    """Return the range of the middle 60 % of the rounds; predictions have no spread."""
    middle = record.ms_p50 or 0
    return record.ms_p20 or middle, record.ms_p80 or middle


def paired(old: Iterable[Record], new: Iterable[Record]) -> list[Pair]:
    """Pair the newest times of the calls that both have."""
    before, after = (
        records.newest((r for r in run if r.command == "bench" and r.ms_p50), _key)
        for run in (old, new)
    )
    return [Pair(record, after[key]) for key, record in before.items() if key in after]


def _key(record: Record) -> tuple[Any, ...]:
    return case(record), record.implementation, record.measured


def time_revisions(
    revisions: Sequence[str], flags: Sequence[str], folder: Path
) -> tuple[list[Record], list[Record]]:
    """Run the benchmark of two git revisions in turns, and return the records of each."""
    rounds: dict[str, list[Record]] = {"old": [], "new": []}
    with worktree(revisions[0], folder / "old"), worktree(revisions[1], folder / "new"):
        for name in ("old", "new", "new", "old"):
            out = folder / f"{len(rounds['old'])}-{len(rounds['new'])}-{name}"
            command = [sys.executable, "-m", "perf", "bench", *flags, "--out", str(out)]
            run_command(command, folder / name)
            rounds[name] += records.read(out)
    return merged(rounds["old"]), merged(rounds["new"])


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[None]:
    """Check a revision out for the duration of the context."""
    here = Path(__file__).parent
    run_command(["git", "worktree", "add", "--quiet", "--detach", str(folder), revision], here)
    try:
        yield
    finally:
        run_command(["git", "worktree", "remove", "--force", str(folder)], here)


def run_command(command: Sequence[str], folder: Path) -> None:
    """Run a command in a folder.

    Raises:
        ValueError: it could not run.
    """
    status = subprocess.run(command, cwd=folder).returncode
    if status > 1:  # 1: triton_gn was wrong somewhere; its records are skipped
        raise ValueError(f"`{shlex.join(command)}` failed with exit status {status} in {folder}.")


def merged(rows: Iterable[Record]) -> list[Record]:
    """Merge the records of each call: the median of medians, the widest spread."""
    calls: dict[Any, list[Record]] = defaultdict(list)
    for record in rows:
        if record.ms_p50:
            calls[_key(record)].append(record)
    return [
        replace(
            same[-1],
            ms_p20=min(spread(record)[0] for record in same),
            ms_p50=median(record.ms_p50 or 0 for record in same),
            ms_p80=max(spread(record)[1] for record in same),
        )
        for same in calls.values()
    ]


def report(pairs: Sequence[Pair]) -> None:
    """Print the ratio of each call and the geometric mean of each implementation."""
    origins = (" ".join((r.device, r.commit[:12])) for r in (pairs[0].old, pairs[0].new))
    table = common.table(
        ["workload", "call, L2", "implementation"],
        ["old ms", "new ms", "ratio"],
        title=" → ".join(origins),
        show_edge=True,
        expand=True,
        padding=0,
    )
    table.columns[0].no_wrap, table.columns[0].ratio = True, 1
    table.add_column("")
    ratios = defaultdict(list)
    for pair in pairs:
        old, new = pair.old, pair.new
        ratios[old.implementation, old.measured].append(pair.ratio)
        table.add_row(
            f"{old.shape} {old.workload}",
            f"{old.direction}, {old.cache}",
            Text(old.implementation),
            f"{old.ms_p50:.4g}",
            f"{new.ms_p50:.4g}",
            f"{pair.ratio:.3f}",
            pair.verdict if old.measured else "predicted",
        )
    table.add_section()
    for (implementation, measured), values in ratios.items():
        mean, word = f"{geometric_mean(values):.3f}", "" if measured else "predicted"
        table.add_row(
            "geometric mean", f"{len(values)} calls", Text(implementation), "", "", mean, word
        )
    Console().print(table)
