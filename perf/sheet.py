"""Themes, titles, panels and styles that all figures share."""

import itertools
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.typing import RcKeyType

from perf.records import DIRECTIONS, OURS, REFERENCES, Record, workload

PYTORCH = ("torch_compile", "torch_eager")
STRATEGIES = tuple(f"{OURS}[{name}]" for name in ("resident", "split", "pipelined"))
IMPLEMENTATIONS = (OURS, *PYTORCH, "liger", "flag_gems", *STRATEGIES)
MARKERS = "oD^Pv<>sX"  # in the order of IMPLEMENTATIONS; the last is for any other
WIDTH = 8.0  # inches: about 800 pixels in a README
LINE = 0.17  # inches from one line of text to the next
MARGIN = 0.1  # inches


def theme(paper: str, ink: str, line: str, grid: str, colors: str) -> dict[RcKeyType, Any]:
    """Return matplotlib's settings for a page."""
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": line,
        "axes.facecolor": paper,
        "axes.grid": True,
        "axes.labelcolor": ink,
        "axes.prop_cycle": cycler(color=colors.split()),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "figure.facecolor": paper,
        "font.size": 8.5,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "legend.borderaxespad": 0,
        "legend.borderpad": 0,
        "legend.frameon": False,
        "legend.handletextpad": 0.4,
        "lines.solid_capstyle": "butt",
        "savefig.dpi": 150,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": OURS,  # the same ids for the same data
        "text.color": ink,
        "xtick.labelcolor": ink,
        "xtick.major.size": 0,
        "ytick.labelcolor": ink,
        "ytick.major.size": 0,
    }


# Okabe and Ito's colours for the colour-blind, in the order of IMPLEMENTATIONS, then brown for any
# other; lighter on GitHub's dark paper. The strategies also differ in lightness, since their
# markers in the roofline show the layout.
LIGHT = "#d55e00 #56b4e9 #59636e #009e73 #cc79a7 #e69f00 #0072b2 #000000 #8c510a"
DARK = "#ff7f2a #a5dcff #b7bdc8 #1fc79a #e79ac4 #f2c14e #3f97dc #ffffff #c9935a"
THEMES = {
    "light": theme("#ffffff", "#1f2328", "#818b98", "#d9dfe5", LIGHT),
    "dark": theme("#0d1117", "#f0f6fc", "#656c76", "#2a3038", DARK),
}


def sheet(
    title: str,
    records: list[Record],
    height: float,
    *,
    about: str = "",
    handles: Sequence[Line2D] = (),
    notes: Sequence[str] = (),
) -> Figure:
    """Return a figure with texts, a legend and room for axes of a height in inches.

    The texts are the title, the origin of the records, and the number of records not drawn.
    """
    titles = textwrap.wrap(title, 72)
    if not all(record.measured for record in records):
        titles.append("predicted, not measured")
    skipped = Counter(record.implementation for record in records if record.skipped)
    names = (name for name in implementations(records) if skipped[name])
    missing = ", ".join(f"{name} {skipped[name]}" for name in names)
    footnotes = [*notes, f"not drawn: {missing}"] if missing else notes
    origins = textwrap.wrap(" · ".join(origin(records, about)), 116)
    footers = textwrap.wrap(" · ".join(footnotes), 116)

    at_origin = MARGIN + 0.25 * len(titles)  # inches from the top
    at_legend = at_origin + LINE * len(origins) + MARGIN
    top = at_legend + 1.15 * LINE * math.ceil(len(handles) / 4)
    bottom = LINE * len(footers) + MARGIN
    total = top + height + bottom
    left, quiet = MARGIN / WIDTH, 0.8
    layout = ConstrainedLayoutEngine(rect=(0, bottom / total, 1, height / total))
    figure = Figure(figsize=(WIDTH, total), layout=layout)
    bold: dict[str, Any] = {"fontsize": "x-large", "weight": "bold"}
    figure.text(left, 1 - MARGIN / total, "\n".join(titles), va="top", **bold)
    figure.text(left, 1 - at_origin / total, "\n".join(origins), va="top", alpha=quiet)
    figure.text(left, MARGIN / total, "\n".join(footers), va="bottom", alpha=quiet)
    corner = (left, 1 - at_legend / total)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=4)
    return figure


def origin(records: list[Record], about: str) -> list[str]:
    """Return the origin of records: devices, dates, protocols, versions."""
    dates = sorted({record.date[:10] for record in records})
    caches = " and ".join(sorted({record.cache for record in records}))
    versions = {
        f"{name} {record.versions[name]}"
        for record in records
        for name in ("torch", "triton")
        if name in record.versions
    }
    texts = [
        about,
        records[0].device,
        " to ".join(sorted({dates[0], dates[-1]})),
        f"{caches} L2",
        *sorted({record.protocol for record in records}),
        ", ".join(sorted(versions)),
    ]
    return [text for text in texts if text]


def panels(
    figure: Figure, records: list[Record], pad: float = 6
) -> Iterator[tuple[Axes, list[Record]]]:
    """Return the panels and their records: directions side by side, caches below each other."""
    across, down = directions(records), sorted({record.cache for record in records})
    grid = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
    for row, cache in zip(grid, down, strict=True):
        for axes, direction in zip(row, across, strict=True):
            axes.set_title(f"{direction}, {cache} L2", pad=pad)
            yield axes, [r for r in records if (r.direction, r.cache) == (direction, cache)]


def cold(records: list[Record], *among: str) -> list[Record]:
    wanted = among or REFERENCES
    return [record for record in records if record.cache == "cold" and record.direction in wanted]


def directions(records: list[Record]) -> list[str]:
    return [name for name in DIRECTIONS if any(record.direction == name for record in records)]


def implementations(records: list[Record]) -> list[str]:
    names = {record.implementation for record in records}
    others = sorted(names - set(IMPLEMENTATIONS))
    return [name for name in IMPLEMENTATIONS if name in names] + others


def labels(records: Iterable[Record]) -> dict[Any, str]:
    """Return the workloads by size, each with its name and what differs from its namesakes."""
    fields = {workload(record): words(record) for record in sorted(records, key=tensor_bytes)}
    names = {}
    for key, mine in fields.items():
        namesakes = [theirs for theirs in fields.values() if theirs[0] == mine[0]]
        columns = zip(*namesakes, strict=True)
        different = [len(set(column)) > 1 for column in columns]
        names[key] = ", ".join([mine[0], *itertools.compress(mine, different)])
    return names


def words(record: Record) -> list[str]:
    """Return the fields of a workload as texts that need no heading."""
    fused = " ".join(["fused", *record.fused]) if record.fused else "nothing fused"
    sizes = [record.shape, f"{record.groups} groups"]
    types = [record.dtype, f"{record.param_dtype} parameters", record.layout]
    return [record.workload, *sizes, *types, f"activation {record.activation}", fused]


def tensor_bytes(record: Record) -> int:
    bits = re.findall(r"\d+", record.dtype)[0]
    return math.prod(map(int, record.shape.split("x"))) * int(bits) // 8


def look(implementation: str) -> dict[str, Any]:
    """Return an implementation's style: ours is the largest, its strategies are hollow."""
    index = [*IMPLEMENTATIONS, implementation].index(implementation)
    return {
        "color": f"C{index}",
        "fillstyle": "none" if "[" in implementation else "full",
        "linestyle": "none",
        "marker": MARKERS[index],
        "markersize": 8 if implementation == OURS else 5.5,
    }


def reference() -> dict[str, Any]:
    """Return the style of a reference line."""
    return {"color": matplotlib.rcParams["text.color"], "linestyle": "--", "linewidth": 1}


def name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Name the rows 0, 1, ... from the top."""
    rows = list(names)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def log_axes(
    axes: Axes, records: list[Record], label: str, base: float, steps: Sequence[float]
) -> None:
    """Make both axes logarithmic: bytes, over at least two powers of ten, and the label's."""
    least, most = (pick(max(1, record.bytes_minimum) for record in records) for pick in (min, max))
    space = max(1.5, math.sqrt(100 * least / most))
    axes.set(xscale="log", xlim=(least / space, most * space))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.set_yscale("log", base=base)
    axes.yaxis.set_major_locator(LogLocator(base, subs=steps))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="bytes, each tensor touched once", ylabel=label)
    axes.label_outer()
