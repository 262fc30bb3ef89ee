"""Measured plans: a table per GPU model, written by ``python -m triton_gn tune``, read by ``plan``.

The user's own table comes before the one that the package ships. A table is data that may come from
anywhere: what is damaged, hostile or another GPU's is ignored with a warning. It never makes a call
fail.
"""

import functools
import json
import math
import os
import re
import reprlib
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import platformdirs

from triton_gn.activations import TABLE as ACTIVATIONS

from .candidates import FIELDS, OWN_FIELDS, config_of
from .config import Config
from .devices import Device
from .limits import fits
from .problem import Problem

SCHEMA = 4
MAX_BYTES = 4 * 2**20
MAX_ENTRIES = 4096
MAX_DISTANCE = 1.0  # in powers of two, all sizes together: half or twice as large at the most
SHIPPED = Path(__file__).parent / "tables"

_MAX_INT = 2**31
_MAX_DIGITS = 20  # longer numbers are not even read
# what a problem's strings may be; tests/plan/test_table.py holds them equal to PyTorch's side
_STRINGS = {
    "direction": ("forward", "backward"),
    "dtype": ("float16", "bfloat16", "float32", "float64"),
    "activation": tuple(ACTIVATIONS),
}


@dataclass(frozen=True)
class Entry:
    """What was measured of one problem: medians in microseconds, with a cold L2 unless named warm.

    ``config`` has the fields of the plan that beat the rule by more than the noise; None: none did.
    """

    problem: Problem
    config: Mapping[str, Any] | None
    rule_us: float
    best_us: float
    noise_us: float
    warm_rule_us: float
    warm_best_us: float
    provenance: Mapping[str, str]  # driver, versions, commit, date, protocol

    def plan_for(self, problem: Problem, device: Device) -> Config | None:
        """Its plan made for a problem, its own or another; None if that cannot run."""
        if self.config is None:
            return None
        config = config_of(problem, **self.config)
        return config if fits(problem, config, device) is None else None


@dataclass(frozen=True)
class Found:
    """What a table says of a problem: a plan, or None where the rule's own is the best."""

    config: Config | None
    path: Path  # of the table
    exact: bool  # or was a problem near this one measured?


def cache_folder() -> Path:
    """Where the user's tables are: ``TRITON_GN_CACHE_DIR``, else where the platform has caches."""
    folder = os.environ.get("TRITON_GN_CACHE_DIR")
    return Path(folder or platformdirs.user_cache_dir("triton-gn", appauthor=False))


def path_of(folder: Path, device: Device) -> Path:
    """The table of a GPU model: nvidia-h100-80gb-hbm3.json for "NVIDIA H100 80GB HBM3"."""
    slug = re.sub("[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return folder / f"{slug or 'gpu'}.json"


def command(problem: Problem) -> str:
    """What to run to tune for exactly this problem."""
    return (
        f"python -m triton_gn tune --shape {problem.n}x{problem.channels}x{problem.pixels} "
        f"--groups {problem.groups} --dtype {problem.dtype} "
        f"--layout {'channels_last' if problem.channels_last else 'contiguous'} "
        f"--activation {problem.activation}"
        + (f" --fused {','.join(problem.fused)}" if problem.fused else "")
    )


def lookup(problem: Problem, device: Device) -> Found | None:
    """What the tables say of a problem, or else of the nearest one that was measured.

    None if none is near. The first plan of a process that is another problem's is warned of.
    """
    paths = [path_of(folder, device) for folder in (cache_folder(), SHIPPED)]
    tables = [(path, table) for path in paths if (table := _table(path, device))]
    for path, table in tables:
        if problem in table:
            return Found(table[problem].plan_for(problem, device), path, exact=True)
    found = _nearest(problem, device, tables)
    if found is not None and found.config is not None:
        _warn_once(
            "a near match",
            f"triton_gn found no measured plan for a problem in {found.path} and takes a similar "
            f"problem's. Remedy: {command(problem)}. It does not say so again.",
        )
    return found


def reload() -> None:
    """Read the tables again when they are next needed."""
    _table.cache_clear()


def _nearest(
    problem: Problem, device: Device, tables: Iterable[tuple[Path, Mapping[Problem, Entry]]]
) -> Found | None:
    kind = _kind(problem)
    near = [
        (distance, path, entry)
        for path, table in tables
        for entry in table.values()
        if _kind(entry.problem) == kind
        and (distance := _distance(entry.problem, problem)) <= MAX_DISTANCE
    ]
    for _, path, entry in sorted(near, key=lambda one: one[0]):  # stable: of equals, the first
        if entry.config is None:
            return Found(None, path, exact=False)
        config = entry.plan_for(problem, device)
        if config is not None and _access(problem, config) == _access(entry.problem, config):
            return Found(config, path, exact=False)
    return None


def _kind(problem: Problem) -> Problem:
    """All but the sizes: plans of another kind are never taken over."""
    return replace(problem, n=1, channels=1, groups=1, pixels=1)


def _distance(a: Problem, b: Problem) -> float:
    def sizes(problem: Problem) -> tuple[int, ...]:
        return problem.n, problem.group_channels, problem.groups, problem.pixels

    return sum(abs(math.log2(x / y)) for x, y in zip(sizes(a), sizes(b), strict=True))


def _access(problem: Problem, config: Config) -> tuple[int, int]:
    """How a plan reads a problem's memory; where that differs, times do not carry over."""
    return problem.access_bytes(config.tile.groups), problem.channels_per_row


@functools.cache
def _table(path: Path, device: Device) -> dict[Problem, Entry]:
    """What can be used of a file, by problem; nothing if there is no such file."""
    try:
        entries = read(path, device)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_of(path, f"its table {path}: {error}")
        return {}
    good = [e for e in entries if e.config is None or e.plan_for(e.problem, device) is not None]
    if len(good) < len(entries):
        what = f"{len(entries) - len(good)} of the {len(entries)} entries of its table {path}"
        _warn_of(path, f"{what}: their plans cannot run")
    return {entry.problem: entry for entry in good}


def _warn_of(path: Path, what: str) -> None:
    remedy = "run `python -m triton_gn tune` again, which replaces it, or delete it"
    _warn_once(str(path), f"triton_gn ignores {what}. Remedy: {remedy}.")


_warned: set[str] = set()


def _warn_once(about: str, message: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, stacklevel=3)


def text_of(device: Device, entries: Iterable[Entry], provenance: Mapping[str, str]) -> str:
    """A table as ``read`` takes it."""
    table = {
        "schema": SCHEMA,
        "device": {"name": device.name, "multiprocessors": device.multiprocessors},
        "provenance": dict(provenance),
        "entries": [asdict(entry) for entry in entries],
    }
    return json.dumps(table, indent=1) + "\n"


def read(path: Path, device: Device) -> list[Entry]:
    """The entries of a GPU's table, every value checked; whether the plans can run is not asked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table of this schema, or another GPU's.
    """
    text = _text_in(path)
    try:
        json_value = json.loads(text, parse_int=_short_int, parse_constant=_no_constant)
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply") from error
    table = _object(json_value, _TABLE)
    measured, here = Device(**table["device"]), Device(device.name, device.multiprocessors)
    if measured != here:
        raise ValueError(f"it is of {_described(measured)}; this GPU is {_described(here)}")
    entries: list[Entry] = table["entries"]
    return entries


def _described(device: Device) -> str:
    return f"{device.name!r} with {device.multiprocessors} multiprocessors"


def _text_in(path: Path) -> str:
    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO waits for its writer

    with open(path, "rb", opener=without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return data.decode()


def _short_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer may have {_MAX_DIGITS} digits; got {len(text)}")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"a number must be finite; got {text}")


# takes a value from JSON and returns what it stands for, or raises ValueError
_Parser = Callable[[Any], Any]


def _that(rule: str, holds: Callable[[Any], bool]) -> _Parser:
    def parse(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must be {rule}; got {reprlib.repr(value)}")
        return value

    return parse


def _one_of(*names: str) -> _Parser:
    return _that(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def _is_int(value: Any) -> bool:
    return type(value) is int  # True and False are instances of int


_integer = _that(f"an integer from 1 to {_MAX_INT}", lambda v: _is_int(v) and 1 <= v <= _MAX_INT)
_flag = _that("true or false", lambda v: isinstance(v, bool))
_us = _that("a finite time", lambda v: (_is_int(v) or isinstance(v, float)) and 0 <= v < math.inf)
_text = _that("a string", lambda v: isinstance(v, str))
_name = _that("a name", lambda v: isinstance(v, str) and len(v) <= 256)
_dict = _that("an object", lambda v: isinstance(v, dict))
_list = _that(
    f"a list of at most {MAX_ENTRIES}", lambda v: isinstance(v, list) and len(v) <= MAX_ENTRIES
)
_schema = _that(f"{SCHEMA}, which this version reads", lambda v: _is_int(v) and v == SCHEMA)


def _part(name: str, parse: _Parser, value: Any) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _object(value: Any, parsers: Mapping[str, _Parser]) -> dict[str, Any]:
    if _dict(value).keys() != parsers.keys():
        raise ValueError(f"must have {', '.join(parsers)}; got {reprlib.repr(list(value))}")
    return {name: _part(name, parse, value[name]) for name, parse in parsers.items()}


def _texts(value: Any) -> dict[str, str]:
    return {name: _part(reprlib.repr(name), _text, text) for name, text in _dict(value).items()}


def _device(value: Any) -> dict[str, Any]:
    return _object(value, {"name": _name, "multiprocessors": _integer})


def _problem(value: Any) -> Problem:
    problem = Problem(**_object(value, _PROBLEM))
    if problem.channels % problem.groups:
        raise ValueError(f"groups must divide the channels; got {problem}")
    return problem


def _plan(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    strategy = _part("strategy", _name, _dict(value).get("strategy"))
    needed = _CONFIG.keys() - (_OWN - set(OWN_FIELDS.get(strategy, ())))
    return _object(value, {name: _CONFIG[name] for name in FIELDS if name in needed})


def _entry(value: Any) -> Entry:
    return Entry(**_object(value, _ENTRY))


def _entries(value: Any) -> list[Entry]:
    return [_part(f"entry {index}", _entry, one) for index, one in enumerate(_list(value))]


_PROBLEM: dict[str, _Parser] = {
    field.name: _one_of(*_STRINGS[field.name])
    if field.name in _STRINGS
    else _flag
    if field.type is bool
    else _integer
    for field in fields(Problem)
}
_OWN = {name for own in OWN_FIELDS.values() for name in own}
_CONFIG: dict[str, _Parser] = dict.fromkeys(FIELDS, _integer) | {"strategy": _name}
_ENTRY: dict[str, _Parser] = {
    "problem": _problem,
    "config": _plan,
    **{field.name: _us for field in fields(Entry) if field.name.endswith("_us")},
    "provenance": _texts,
}
_TABLE: dict[str, _Parser] = {
    "schema": _schema,
    "device": _device,
    "provenance": _texts,
    "entries": _entries,
}
