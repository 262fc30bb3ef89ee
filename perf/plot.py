"""Draw figures of results files as SVG and PNG, for light and for dark pages.

Only records are read, so a figure can be drawn anywhere, without a GPU.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from perf import records
from perf.evidence_figures import draw_all
from perf.figures import copy_share, memory, roofline, speedup, sweep
from perf.records import FIGURES, RESULTS, Record, case, slug, workload
from perf.sheet import THEMES, labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the paths to read and the folder to write to."""
    paths = f"results files, or folders of them (default: {RESULTS})"
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[RESULTS], metavar="PATH", help=paths
    )
    parser.add_argument(
        "--evidence", action="store_true", help="draw what needs no GPU: accuracy, traffic, schemes"
    )
    out = f"where the figures go (default: {FIGURES})"
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="FOLDER", help=out)


def run(options: argparse.Namespace) -> int:
    """Draw the records of the paths and print each file; return the exit status."""
    evidence = options.evidence
    paths = draw_all(options.out) if evidence else draw(load(options.paths), options.out)
    for path in paths:
        print(path)
    return 0


def load(paths: Sequence[Path]) -> list[Record]:
    """Return the records of results files and of folders of them.

    Raises:
        ValueError: there is no such path, there are no records, or a line is not a record.
    """
    rows = [record for path in paths for record in records.read(path)]
    if not rows:
        raise ValueError(
            f"there must be records to draw; got none in {', '.join(map(str, paths))}. "
            "Run `python -m perf bench` first."
        )
    return rows


def draw(rows: list[Record], folder: Path, only: str = "") -> list[Path]:
    """Write all figures of the records, or those of one command; return the paths.

    Print which figures have no data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device, measured in sorted({(record.device, record.measured) for record in rows}):
        chosen = [r for r in rows if (r.device, r.measured) == (device, measured)]
        kind = "" if measured else "predicted-"
        for name, command, plot in plots(chosen):
            if only not in ("", command):
                continue
            written = save(plot, f"{kind}{name}-{slug(device)}", folder)
            if not written:
                print(f"{kind}{name}: no data; `python -m perf {command}` on {device} measures it")
            paths += written
    return paths


def plots(rows: list[Record]) -> Iterator[tuple[str, str, Callable[[], Figure | None]]]:
    """Return each figure's name, the command that measures its data, and a function to draw it."""
    benched, sweeps = divide(rows)
    for plot in copy_share, speedup, roofline, memory:
        yield plot.__name__.replace("_", "-"), "bench", partial(plot, benched)
    names = labels(swept[0] for swept in sweeps)
    for swept in sweeps:
        name = names[workload(swept[0])]
        warm = "-warm" if swept[0].cache == "warm" else ""
        stem = f"sweep-{slug(name)}-{swept[0].direction}{warm}"
        yield stem, "sweep", partial(sweep, swept, name)
    if not sweeps:
        yield "sweep", "sweep", lambda: None


def save(plot: Callable[[], Figure | None], stem: str, folder: Path) -> list[Path]:
    """Write a figure in both themes and formats; return the paths, none if it has no data."""
    paths = []
    for name, settings in THEMES.items():
        with matplotlib.rc_context(settings):
            figure = plot()
            if figure is None:
                return []
            # without dates and versions a file changes only with its data
            for suffix, omitted in ("svg", ("Date", "Creator")), ("png", ("Software",)):
                paths.append(folder / f"{stem}-{name}.{suffix}")
                figure.savefig(paths[-1], metadata=dict.fromkeys(omitted))
            shrink(paths[-1])
    return paths


def shrink(png: Path) -> None:
    """Give a PNG a palette; it then takes a third of the bytes."""
    # the octree keeps rare colours, which the default median cut merges
    figure = Image.open(png).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE)
    figure.save(png, optimize=True)


def divide(rows: list[Record]) -> tuple[list[Record], list[list[Record]]]:
    """Return the bench records and the sweeps, the newest of each call."""

    def call(record: Record) -> tuple[Any, ...]:
        plan = json.dumps(record.config, sort_keys=True) if record.command == "sweep" else ""
        return record.command, case(record), record.implementation, plan

    benched: list[Record] = []
    sweeps: dict[Any, list[Record]] = defaultdict(list)
    for record in records.newest(rows, call).values():
        if record.command == "sweep":
            sweeps[case(record)].append(record)
        elif record.command == "bench":
            benched.append(record)
    return benched, list(sweeps.values())
