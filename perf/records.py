"""One line of JSON per measurement: what bench and sweep write and what compare and plot read."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

OURS = "triton_gn"
REFERENCES = {"forward": "copy", "backward": "add"}  # they move as many bytes and do no more
DIRECTIONS = (*REFERENCES, "both")
RESULTS = Path("perf/results")
PREDICTED = RESULTS / "predicted"
FIGURES = Path("perf/figures")
_WORKLOAD = ("workload", "shape", "groups", "dtype", "param_dtype", "layout", "activation", "fused")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A provider's time for a workload, in long form.

    ``measured`` is False for what the model of ``triton_gn.plan`` predicts: such records have a
    device, a folder and plots of their own, and no ``ms_p20`` and ``ms_p80``. ``skipped`` says why
    there is no time: the provider is absent, or its answer was wrong.
    """

    measured: bool
    command: str  # "bench" or "sweep": what wrote it
    device: str  # as its driver names it
    workload: str  # what it is called: a model and a layer, or a shape
    shape: str  # "2x320x64x64": n, channels, spatial sizes
    groups: int
    dtype: str
    param_dtype: str
    layout: str  # "contiguous" or "channels_last"
    activation: str
    fused: tuple[str, ...] = ()  # of scale, shift, pre_add, residual
    direction: str  # "forward", "backward" or "both": a forward that records and its backward
    provider: str  # "triton_gn", "triton_gn[split]", "torch_eager", ..., "copy", "add"
    cache: str = "cold"  # or "warm": does L2 hold the operands before the call?
    strategy: str | None = None
    # the fields of triton_gn.plan.FIELDS; in a sweep, "rule": True marks the rule's own
    config: dict[str, Any] | None = None
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    bytes_minimum: int = 0  # each tensor touched once
    share_of_copy: float | None = None  # time of copying as many bytes over ms_p50, same run
    peak_bytes: int | None = None  # allocated during the call, above what was there before it
    host_us: float | None = None  # of Python and PyTorch until the call returns
    error: float | None = None  # largest, over the largest value, against float64
    bound: str | None = None  # predictions: what sets the time, as in triton_gn.plan.Estimate
    registers: int | None = None  # the most of any kernel of the call
    spill_bytes: int | None = None
    skipped: str | None = None
    protocol: str = ""  # how it was timed, in words
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""  # ISO 8601, in UTC

    @property
    def gb_per_s(self) -> float | None:
        """Bytes of the minimum over the median time."""
        return self.bytes_minimum / self.ms_p50 / 1e6 if self.ms_p50 else None

    @classmethod
    def from_json(cls, line: str) -> Self:
        """From a line of a results file; fields of other versions are left out."""
        known = {one.name for one in fields(cls)}
        values = {name: value for name, value in json.loads(line).items() if name in known}
        return cls(**values | {"fused": tuple(values.get("fused", ()))})

    def to_json(self) -> str:
        """As one line, of what there is to say."""
        values = asdict(self) | {"gb_per_s": self.gb_per_s}
        return json.dumps({name: value for name, value in values.items() if value is not None})


workload = attrgetter(*_WORKLOAD)  # all that the calls of different providers have in common
case = attrgetter(*_WORKLOAD, "direction", "cache")  # what two times must share to be compared


def read(path: Path) -> Iterator[Record]:
    """The records of a file, or of all ``*.jsonl`` below a folder, in order of their names.

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


def save(path: Path, found: Iterable[Record], anew: bool = False) -> None:
    """Append records to a file, or write it anew: then whoever reads it sees all of it or none.

    Raises:
        ValueError: predictions would lie among measurements, or the other way round.
    """
    found = list(found)
    among_predictions = PREDICTED.name in path.parts
    if any(one.measured is among_predictions for one in found):
        kind = "measured ones" if among_predictions else "predicted ones elsewhere"
        raise ValueError(
            f"predicted records, and no others, lie below a folder {PREDICTED.name!r}; got {kind}: "
            f"{path}. Remedy: another --out."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.with_suffix(".new") if anew else path
    with target.open("w" if anew else "a") as file:
        file.writelines(f"{one.to_json()}\n" for one in found)
    target.replace(path)


def folder_of(device: str, measured: bool) -> Path:
    """Where the results of a device go unless told."""
    return (RESULTS if measured else PREDICTED) / slug(device)


def slug(text: str) -> str:
    """Fit for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
