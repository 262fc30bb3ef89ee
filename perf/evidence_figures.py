"""Figures of the evidence records and of how the strategies work, each for light and dark pages.

A figure is one SVG, whose colours are CSS variables that follow the page.
"""

import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from perf import records
from perf.records import FIGURES, OURS, RESULTS
from perf.sheet import THEMES, WIDTH

TEXT_SIZE = 10.5  # points: 14 pixels, as the text of a page
COLORS = {OURS: "C0", "torch.compile": "C1", "torch": "C2", "liger": "C3", "flag_gems": "C4"}
READ, READ_AGAIN, WRITTEN = "C6", "C2", "C0"

Draw = Callable[[dict[str, Any]], Figure]


def draw(name: str, record: dict[str, Any], folder: Path = FIGURES) -> Path:
    """Write the figure of a command's record, or a schematic; return its path."""
    path = folder / f"{name}.svg"
    records.replace(path, adaptive_svg(lambda: FIGURE_OF[name](record)))
    return path


def draw_all(folder: Path = FIGURES) -> Iterator[Path]:
    """Write the schematics, and the figures of the records that exist; yield the paths."""
    for name in FIGURE_OF:
        file = RESULTS / f"{name}.json"
        if name in SCHEMATICS or file.exists():
            yield draw(name, json.loads(file.read_text()) if file.exists() else {}, folder)


def adaptive_svg(plot: Callable[[], Figure]) -> str:
    """Return a figure as an SVG whose colours are those of the theme that the page has."""
    text = svg_text(plot, "light")
    light, dark = (_colors(THEMES[name]) for name in ("light", "dark"))
    variables: dict[str, tuple[str, str]] = {}
    for index, (before, after) in enumerate(zip(light, dark, strict=True)):
        variables.setdefault(before, (f"--c{index}", after))
    pattern = re.compile("|".join(variables))
    body = pattern.sub(lambda match: f"var({variables[match[0]][0]})", text)
    values = [(name, before, after) for before, (name, after) in variables.items()]
    here, there = (
        "".join(f"{name}:{value[index]};" for name, *value in values) for index in range(2)
    )
    dark_page = f"@media(prefers-color-scheme:dark){{:root{{{there}}}}}"
    style = f"<style>:root{{{here}}}{dark_page}</style>"
    return re.sub(r"(<svg [^>]*>)", rf"\1{style}", body, count=1)


def svg_text(plot: Callable[[], Figure], theme: str) -> str:
    """Return a figure as the SVG of one theme."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**THEMES[theme], "font.size": TEXT_SIZE}):
        plot().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _colors(theme: Any) -> list[str]:
    names = ("figure.facecolor", "text.color", "axes.edgecolor", "grid.color")
    cycle = [entry["color"] for entry in theme["axes.prop_cycle"]]
    return [*(theme[name] for name in names), *cycle]


def _figure(height: float) -> Figure:
    layout = ConstrainedLayoutEngine(rect=(0.005, 0.01, 0.99, 0.98))
    return Figure(figsize=(WIDTH, height), layout=layout)


def accuracy(record: dict[str, Any]) -> Figure:
    """Draw the error of y over the mean, in float32 and contiguous: a line for each package."""
    rows = [
        row
        for row in record["rows"]
        if (row["over"], row["dtype"], row["layout"]) == ("mean", "float32", "contiguous")
    ]
    figure = _figure(4.2)
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == name]
        finite = list(itertools.takewhile(lambda row: row["y"] is not None, mine))
        ratios, errors = ([row[field] for row in finite] for field in ("ratio", "y"))
        is_ours = name == OURS
        color = COLORS[name.partition(",")[0]]
        axes.plot(ratios, errors, color=color, linewidth=3 if is_ours else 1.8)
        axes.annotate(
            name if finite == mine else f"{name}, then NaN", (ratios[-1], errors[-1]), (6, 0),
            textcoords="offset points", color=color, va="center",
            weight="bold" if is_ours else "normal",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(1, 3e7), ylim=(3e-8, 1))
    axes.set_xticks([10**power for power in range(0, 7, 2)])
    axes.set_xlabel("|mean| / standard deviation of the input", loc="left")
    axes.set_title("Largest error of y over the largest y, float32, against float64")
    axes.tick_params(which="minor", length=0)
    return figure


def traffic(record: dict[str, Any]) -> Figure:
    """Draw bytes over the minimum: a bar for each implementation, its mean over the layers."""
    names = list(dict.fromkeys(row["implementation"] for row in record["rows"]))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(names)), layout="constrained")
    layers = len({row["layer"] for row in record["rows"]})
    figure.suptitle(
        f"Bytes moved by GroupNorm and SiLU, over the minimum ({layers} layers of real models)",
        x=0.01, ha="left", weight="bold", fontsize="medium",
    )  # fmt: skip
    for axes, direction in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), ("forward", "backward"), strict=True
    ):
        for height, name in enumerate(names):
            mean = mean_over_minimum(record, name, direction)
            axes.barh(height, mean, color=COLORS[name], height=0.7)
            axes.text(mean, height, f" {mean:.2f}", va="center")
        axes.axvline(1, color=matplotlib.rcParams["text.color"], linestyle="--", linewidth=1)
        axes.set_title(direction, weight="normal")
        axes.set_yticks(range(len(names)), [_bar_name(record, n, layers) for n in names])
        axes.set(xlim=(0, 1.18 * axes.dataLim.xmax), ylim=(len(names) - 0.5, -0.5))
        axes.grid(visible=False, axis="y")
    return figure


def _bar_name(record: dict[str, Any], implementation: str, layers: int) -> str:
    """Return an implementation's name, with the number of layers that it can run if not all."""
    rows = [row for row in record["rows"] if row["implementation"] == implementation]
    able = len({row["layer"] for row in rows})
    return implementation if able == layers else f"{implementation}, {able} of {layers}"


def mean_over_minimum(record: dict[str, Any], implementation: str, direction: str) -> float:
    """Return the geometric mean over all layers of bytes over the minimum."""
    wanted = implementation, direction
    return geometric_mean(
        row["over_minimum"]
        for row in record["rows"]
        if (row["implementation"], row["direction"]) == wanted
    )


def strategies(_: dict[str, Any]) -> Figure:
    """Draw what the programs of each strategy read and write, over time."""
    figure = _figure(4.6)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(2, 2, 1.2))
    for axes, (title, programs) in zip(panels, _TIMELINES.items(), strict=True):
        for lane, steps in enumerate(programs):
            for start, length, color, text in steps:
                _box(axes, start, lane, length, color, text)
        axes.set_title(title, weight="normal")
        axes.set(xlim=(0, 12), ylim=(len(programs) - 0.4, -0.6))
        axes.set_yticks(range(len(programs)), [f"program {lane}" for lane in range(len(programs))])
        axes.grid(visible=False)
        axes.tick_params(axis="x", labelbottom=False)
        axes.spines[["left", "bottom"]].set_visible(False)
    panels[1].axvline(6, color=matplotlib.rcParams["text.color"], linestyle="--", linewidth=1)
    panels[2].set_xlabel("time →", loc="left")
    key = {READ: "read x", READ_AGAIN: "read x again, which L2 may serve", WRITTEN: "write y"}
    handles = [Patch(color=color, label=label) for color, label in key.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1)
    return figure


# of each strategy: for each program start, length, colour and text of what it does
_TIMELINES: dict[str, list[list[tuple[float, float, str, str]]]] = {
    "resident: a program keeps whole groups in registers, one launch": [
        [(0, 3, READ, "group 0"), (3.2, 3, WRITTEN, "group 0")],
        [(0, 3, READ, "group 1"), (3.2, 3, WRITTEN, "group 1")],
    ],
    "split: programs share a group; a second launch (dashed) goes back from the first one's end": [
        [
            (0, 2.8, READ, "group 0, first half"),
            (6.2, 2.6, READ_AGAIN, "group 0, first half"),
            (8.9, 2.6, WRITTEN, "group 0, first half"),
        ],
        [
            (0, 2.8, READ, "group 0, second half"),
            (6.2, 2.6, READ_AGAIN, "group 0, second half"),
            (8.9, 2.6, WRITTEN, "group 0, second half"),
        ],
    ],
    "pipelined: as split, in one launch; the second pass of a group follows some groups later": [
        [
            (0, 1.5, READ, "group 0"),
            (1.6, 1.5, READ, "group 1"),
            (3.2, 1.5, READ_AGAIN, "group 0"),
            (4.8, 1.5, WRITTEN, "group 0"),
            (6.4, 1.5, READ, "group 2"),
            (8.0, 1.5, READ_AGAIN, "group 1"),
            (9.6, 1.5, WRITTEN, "group 1"),
        ],
    ],
}


def _box(axes: Axes, left: float, lane: float, width: float, color: str, text: str) -> None:
    axes.add_patch(Rectangle((left, lane - 0.4), width, 0.8, color=color, linewidth=0))
    paper = axes.get_facecolor()
    axes.text(left + width / 2, lane, text, ha="center", va="center", color=paper, fontsize="small")


def tile(_: dict[str, Any]) -> Figure:
    """Draw the elements of a sample, and which of them one program takes, in both layouts."""
    figure = _figure(3.6)
    left, right = figure.subplots(1, 2)
    left.set_title("contiguous: one group", weight="normal")
    left.set(xlabel="pixels, adjacent in memory →", ylabel="← channels")
    right.set_title("channels-last: whole adjacent groups", weight="normal")
    right.set(xlabel="channels, adjacent in memory →", ylabel="← pixels")
    ink = matplotlib.rcParams["text.color"]
    # elements across and down, across and down of the tile, of a fragment, and of a group
    for axes, sample, held, fragment, group in (
        (left, (16, 8), (16, 4), (8, 2), (16, 4)),
        (right, (8, 16), (4, 16), (4, 4), (2, 16)),
    ):
        for x in range(0, sample[0], group[0]):
            for y in range(0, sample[1], group[1]):
                color = READ if x < held[0] and y < held[1] else READ_AGAIN
                _area(axes, (x, y), group, facecolor=color, alpha=0.55)
        for x in range(0, held[0], fragment[0]):
            for y in range(0, held[1], fragment[1]):
                _area(axes, (x, y), fragment, fill=False, edgecolor=ink, linestyle=":")
        _area(axes, (0, 0), held, fill=False, edgecolor=WRITTEN, linewidth=3, zorder=4)
        axes.set(xlim=(-0.3, sample[0] + 0.3), ylim=(sample[1] + 0.3, -0.3))
        axes.set(xticks=[], yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=WRITTEN, linewidth=3, label="program tile"),
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=ink, linestyle=":", label="fragment"),
        Patch(facecolor=READ, alpha=0.55, label="groups of this program"),
        Patch(facecolor=READ_AGAIN, alpha=0.55, label="other groups"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1)
    return figure


def _area(axes: Axes, corner: tuple[int, int], size: tuple[int, int], **style: Any) -> None:
    inset = 0.06
    left, top = (start + inset for start in corner)
    width, height = (length - 2 * inset for length in size)
    axes.add_patch(Rectangle((left, top), width, height, **style))


SCHEMATICS = "strategies", "tile"
FIGURE_OF: dict[str, Draw] = {
    "accuracy": accuracy,
    "traffic": traffic,
    "strategies": strategies,
    "tile": tile,
}
