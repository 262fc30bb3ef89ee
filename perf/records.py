"""Records: one line of JSON per measurement, written by bench and sweep, read by the others."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

OURS = "triton_gn"
REFERENCES = {"forward": "copy", "backward": "add"}  # they run at the speed of light
DIRECTIONS = (*REFERENCES, "both")
RESULTS = Path("perf/results")
PREDICTED = RESULTS / "predicted"
FIGURES = Path("perf/figures")
_WORKLOAD = ("workload", "shape", "groups", "dtype", "param_dtype", "layout", "activation", "fused")


@dataclass(frozen=True, kw_only=True)
class Record:
    """An implementation's time for a workload, in long form.

    ``measured`` is False for predictions of ``triton_gn.plan``. They have their own folder and
    plots, and no ``ms_p20`` and ``ms_p80``. ``skipped`` is the reason why there is no time: a wrong
    answer, an error, or too little memory.
    """

    measured: bool
    command: str  # that wrote it: "bench", "sweep" or "ceilings"
    device: str  # the driver's name for it
    workload: str  # its name: a model and a layer, or a shape
    shape: str  # "2x320x64x64": n, channels, spatial sizes
    groups: int
    dtype: str
    param_dtype: str
    layout: str  # "contiguous" or "channels_last"
    activation: str
    fused: tuple[str, ...] = ()  # of scale, shift, pre_add, residual
    direction: str  # "forward", "backward" or "both": a recording forward and its backward
    implementation: str  # "triton_gn", "triton_gn[split]", "torch_eager", ..., "copy", "add"
    cache: str = "cold"  # or "warm": L2 holds the operands before the call
    strategy: str | None = None
    # the fields of triton_gn.plan.FIELDS; in a sweep, "default": True marks the default config
    config: dict[str, Any] | None = None
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    bytes_minimum: int = 0  # with each tensor touched once
    share_of_copy: float | None = None  # time of copying as many bytes over ms_p50, same run
    peak_bytes: int | None = None  # allocated by the call at its peak
    host_us: float | None = None  # until the call returns
    error: float | None = None  # largest error against float64 over the largest value
    bound: str | None = None  # predictions only: the bound of triton_gn.plan.Estimate
    registers: int | None = None  # of the kernel that takes most
    spill_bytes: int | None = None
    skipped: str | None = None
    protocol: str = ""  # how it was timed
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""  # ISO 8601, in UTC

    @property
    def gb_per_s(self) -> float | None:
        """Minimum of bytes over the median time."""
        return self.bytes_minimum / self.ms_p50 / 1e6 if self.ms_p50 else None

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a line of a results file, without fields of other versions."""
        known = {column.name for column in fields(cls)}
        values = {name: value for name, value in json.loads(line).items() if name in known}
        return cls(**values | {"fused": tuple(values.get("fused", ()))})

    def to_json(self) -> str:
        """Return the record as one line, without empty fields."""
        values = asdict(self) | {"gb_per_s": self.gb_per_s}
        return json.dumps({name: value for name, value in values.items() if value is not None})


workload = attrgetter(*_WORKLOAD)
case = attrgetter(*_WORKLOAD, "direction", "cache")  # times of one case can be compared


def read(path: Path) -> Iterator[Record]:
    """Read the records of a file, or of all ``*.jsonl`` below a folder in the order of names.

    Raises:
        ValueError: there is no such path, or a line is not a record.
    """
    if not path.exists():
        raise ValueError(
            f"a path must be a results file or a folder of them; there is no {path}. "
            "Name one that `python -m perf bench` wrote."
        )
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                if line.strip():
                    yield Record.from_json(line)
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"each line must be a record as JSON; line {number} of {file} is not "
                    f"({error}): {line[:40]!r}. Delete the line and measure again."
                ) from error


def newest(rows: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, Record]:
    """Return the newest record for each key."""
    return {key(record): record for record in sorted(rows, key=attrgetter("date"))}


def save(path: Path, rows: Iterable[Record], anew: bool = False) -> None:
    """Append records to a file, or replace it.

    Raises:
        ValueError: predictions would lie among measurements, or the other way round.
    """
    rows = list(rows)
    among_predictions = PREDICTED.name in path.parts
    if any(record.measured is among_predictions for record in rows):
        kind = "measured ones" if among_predictions else "predicted ones elsewhere"
        raise ValueError(
            f"predicted records, and no others, lie below a folder {PREDICTED.name!r}; got {kind}: "
            f"{path}. Remedy: another --out."
        )
    text = "".join(f"{record.to_json()}\n" for record in rows)
    if anew:
        replace(path, text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def replace(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new text, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def folder_of(device: str, measured: bool) -> Path:
    """Return the default folder for the results of a device."""
    return (RESULTS if measured else PREDICTED) / slug(device)


def slug(text: str) -> str:
    """Return a text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
