"""Measured plans: a table per GPU model, written by ``python -m triton_gn tune``, read by ``plan``.

The user's table comes before the one that the package ships. A file that is damaged, outdated or
of another GPU is ignored with one warning. No table makes a call fail.
"""

import functools
import json
import math
import os
import re
import reprlib
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import platformdirs

from .candidates import config_of
from .config import Config
from .devices import Device
from .limits import fits
from .problem import ITEMSIZE, Problem

SCHEMA = 5
MAX_BYTES = 4 * 2**20
MAX_DISTANCE = 1.0  # in powers of two, all sizes together: at most half or twice as large
SHIPPED = Path(__file__).parent / "tables"

_MAX_NUMBER = 2**31


@dataclass(frozen=True)
class Entry:
    """Times of one problem: medians in microseconds, with a cold L2 unless named warm.

    ``config`` has the fields of the config that beat the default by more than the noise; None: the
    default is the best.
    """

    problem: Problem
    config: Mapping[str, Any] | None
    default_us: float
    best_us: float
    noise_us: float
    warm_default_us: float
    warm_best_us: float
    provenance: Mapping[str, str]  # driver, versions, commit, date, protocol

    def plan_for(self, problem: Problem, device: Device) -> Config | None:
        """Return the measured plan adapted to a problem; None if it cannot run."""
        if self.config is None:
            return None
        config = config_of(problem, **self.config)
        return config if fits(problem, config, device) is None else None


@dataclass(frozen=True)
class Match:
    """A table's answer for a problem: a plan, or None where the default config is the best."""

    config: Config | None
    path: Path  # of the table
    exact: bool  # False: the times are those of a similar problem


def cache_folder() -> Path:
    """Return the folder of the user's tables: ``TRITON_GN_CACHE_DIR`` or the platform's cache."""
    folder = os.environ.get("TRITON_GN_CACHE_DIR")
    return Path(folder or platformdirs.user_cache_dir("triton-gn", appauthor=False))


def path_of(folder: Path, device: Device) -> Path:
    """Return the path of a GPU model's table: nvidia-h100-80gb-hbm3.json for an H100."""
    slug = re.sub("[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return folder / f"{slug or 'gpu'}.json"


def command(problem: Problem) -> str:
    """Return the command that tunes for exactly this problem."""
    return (
        f"python -m triton_gn tune --shape {problem.n}x{problem.channels}x{problem.pixels} "
        f"--groups {problem.groups} --dtype {problem.dtype} "
        f"--layout {'channels_last' if problem.channels_last else 'contiguous'} "
        f"--activation {problem.activation}"
        + (f" --fused {','.join(problem.fused)}" if problem.fused else "")
    )


def lookup(problem: Problem, device: Device) -> Match | None:
    """Look a problem up in the tables, or else the nearest problem that was measured.

    Returns None if no problem is near. The first plan that is taken from another problem is warned
    of.
    """
    paths = [path_of(folder, device) for folder in (cache_folder(), SHIPPED)]
    tables = [(path, _table(path, device)) for path in paths]
    for path, table in tables:
        if problem in table:
            return Match(table[problem].plan_for(problem, device), path, exact=True)
    match = _nearest(problem, device, tables)
    if match is not None and match.config is not None:
        _warn_once(
            "a near match",
            f"triton_gn found no measured plan for a problem in {match.path} and takes a similar "
            f"problem's. Remedy: {command(problem)}. It does not say so again.",
        )
    return match


def reload() -> None:
    """Read the tables again when they are next needed."""
    _table.cache_clear()


def _nearest(
    problem: Problem, device: Device, tables: Iterable[tuple[Path, Mapping[Problem, Entry]]]
) -> Match | None:
    kind = _without_sizes(problem)
    near = [
        (distance, path, entry)
        for path, table in tables
        for entry in table.values()
        if _without_sizes(entry.problem) == kind
        and (distance := _distance(entry.problem, problem)) <= MAX_DISTANCE
    ]
    # sorted is stable: of entries that are equally near, the first comes first
    for _, path, entry in sorted(near, key=lambda candidate: candidate[0]):
        if entry.config is None:
            return Match(None, path, exact=False)
        config = entry.plan_for(problem, device)
        if config is not None and _access(problem, config) == _access(entry.problem, config):
            return Match(config, path, exact=False)
    return None


def _without_sizes(problem: Problem) -> Problem:
    """Return what two problems must share for one to take over the other's plan."""
    return replace(problem, n=1, channels=1, groups=1, pixels=1)


def _distance(a: Problem, b: Problem) -> float:
    def sizes(problem: Problem) -> tuple[int, ...]:
        return problem.n, problem.group_channels, problem.groups, problem.pixels

    return sum(abs(math.log2(x / y)) for x, y in zip(sizes(a), sizes(b), strict=True))


def _access(problem: Problem, config: Config) -> tuple[int, int]:
    """Return how a plan reads memory; where that differs, times do not carry over."""
    return problem.access_bytes(config.tile.groups), problem.channels_per_row


@functools.cache
def _table(path: Path, device: Device) -> dict[Problem, Entry]:
    """Return the usable entries of a file by problem; none if there is no such file."""
    try:
        entries = read(path, device)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_ignored(path, f"its table {path}: {error}")
        return {}
    runnable = [e for e in entries if e.config is None or e.plan_for(e.problem, device)]
    if len(runnable) < len(entries):
        skipped = f"{len(entries) - len(runnable)} of the {len(entries)} entries"
        _warn_ignored(path, f"{skipped} of its table {path}: their plans cannot run")
    return {entry.problem: entry for entry in runnable}


def _warn_ignored(path: Path, what: str) -> None:
    remedy = "run `python -m triton_gn tune` again, which replaces it, or delete it"
    _warn_once(str(path), f"triton_gn ignores {what}. Remedy: {remedy}.")


_warned: set[str] = set()


def _warn_once(about: str, message: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, stacklevel=3)


def text_of(device: Device, entries: Iterable[Entry]) -> str:
    """Return a table as JSON that ``read`` accepts."""
    table = _header(device) | {"entries": [asdict(entry) for entry in entries]}
    return json.dumps(table, indent=1) + "\n"


def read(path: Path, device: Device) -> list[Entry]:
    """Read the entries of a GPU's table and check their types; ``fits`` is not asked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table of this schema, or another GPU's.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for its writer
        raise ValueError("it is no regular file")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        table = json.loads(path.read_bytes())
        for name, expected in _header(device).items():
            if table[name] != expected:
                raise ValueError(f"{name} must be {expected}; got {reprlib.repr(table[name])}")
        return [_entry(values) for values in table["entries"]]
    except (KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ValueError(f"it is damaged ({reason})") from error


def _header(device: Device) -> dict[str, Any]:
    gpu = {"name": device.name, "multiprocessors": device.multiprocessors}
    return {"schema": SCHEMA, "device": gpu}


def _entry(values: Any) -> Entry:
    """Construct an entry; Python raises a TypeError if a field is missing or unknown."""
    problem = Problem(**values["problem"])
    _check_fields(problem)
    known = problem.direction in ("forward", "backward") and problem.dtype in ITEMSIZE
    if not known or problem.channels % problem.groups:
        raise ValueError(f"a problem must be one of GroupNorm; got {reprlib.repr(problem)}")
    entry = Entry(**values | {"problem": problem})
    _check_fields(entry)
    _check("provenance", entry.provenance, dict)
    if entry.config is not None:
        _check("config", entry.config, dict)
        for name, value in entry.config.items():
            _check(name, value, str if name == "strategy" else int)
        config_of(problem, **entry.config)
    return entry


def _check_fields(instance: Problem | Entry) -> None:
    for field in fields(instance):
        if field.type in (str, bool, int, float):
            _check(field.name, getattr(instance, field.name), field.type)


def _check(name: str, value: Any, kind: Any) -> None:
    """Refuse another type, a bool for an int, and numbers that are not sizes or finite times."""
    lowest = 1 if kind is int else 0
    is_number = kind in (int, float)
    if type(value) is not kind or (is_number and not lowest <= value <= _MAX_NUMBER):
        bounds = f" from {lowest} to {_MAX_NUMBER}" if is_number else ""
        raise ValueError(
            f"{name} must be of type {kind.__name__}{bounds}; got {reprlib.repr(value)}"
        )
