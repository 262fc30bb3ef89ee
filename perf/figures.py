"""Draw each figure from records; None if they have no data for it."""

import math
import statistics
from collections import defaultdict
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from perf.records import OURS, REFERENCES, Record, case, workload
from perf.sheet import (
    PYTORCH,
    cold,
    directions,
    implementations,
    labels,
    log_axes,
    look,
    name_rows,
    panels,
    reference,
    sheet,
    tensor_bytes,
    words,
)

LAYOUTS = {"contiguous": "o", "channels_last": "s"}
# filled part of a marker
BOUNDS = {"dram": "full", "l2": "left", "issue": "right", "occupancy": "bottom", "launch": "none"}
MAX_ROWS = 30  # more workloads become a curve
MAX_SLOWDOWN = 4  # end of the colour scale of a sweep


def copy_share(records: list[Record]) -> Figure | None:
    """Draw the share of copy speed: a row per workload or, of many, each implementation's curve."""
    scope = [one for one in cold(records) if one.implementation not in REFERENCES.values()]
    drawn = [one for one in scope if one.share_of_copy]
    if not drawn:
        return None
    names = labels(drawn)
    few = len(names) <= MAX_ROWS
    figure = sheet(
        "Share of the speed of a copy (forward) / an addition (backward)",
        scope,
        0.6 + 0.2 * len(names) if few else 3.5,
        handles=[Line2D([], [], label=name, **look(name)) for name in implementations(drawn)],
        notes=["the smallest tensor on top"] * few,
    )
    for axes, here in panels(figure, drawn):
        (draw_rows if few else draw_curves)(axes, here, names)
    (axes.set_xlim if few else axes.set_ylim)(0)  # last: the panels share their limits
    return figure


def draw_rows(axes: Axes, records: list[Record], names: dict[Any, str]) -> None:
    axes.axvline(1, **reference())
    rows = list(names)
    for implementation in reversed(implementations(records)):  # ours on top
        mine = [one for one in records if one.implementation == implementation]
        heights = [rows.index(workload(one)) for one in mine]
        shares = [one.share_of_copy or 0 for one in mine]
        axes.plot(shares, heights, clip_on=False, **look(implementation))
    axes.set_xlabel(f"{REFERENCES[records[0].direction]} = 1")
    name_rows(axes, names.values())


def draw_curves(axes: Axes, records: list[Record], names: dict[Any, str]) -> None:
    axes.axhline(1, **reference())
    for implementation in reversed(implementations(records)):
        shares = sorted(
            one.share_of_copy or 0 for one in records if one.implementation == implementation
        )
        steps = [100 * (step + 0.5) / len(shares) for step in range(len(shares))]
        axes.plot(steps, shares, **look(implementation) | {"linestyle": "-", "markevery": 0.1})
    axes.set_xlabel(f"% of {len(names)} workloads, slowest first")
    axes.set_ylabel(f"{REFERENCES[records[0].direction]} = 1")


def speedup(records: list[Record]) -> Figure | None:
    """Draw PyTorch's times over triton_gn's, with their geometric means."""
    scope = [one for one in records if one.implementation in (OURS, *PYTORCH)]
    ours = {case(one): one for one in scope if one.implementation == OURS}
    drawn = [one for one in scope if one.implementation != OURS and ratio(one, ours, "ms_p50")]
    if not drawn:
        return None
    figure = sheet(
        "Speed-up: time of PyTorch over time of triton_gn",
        scope,
        3.4 * len({one.cache for one in drawn}),
        notes=["beside the names: geometric means"],
    )
    for axes, here in panels(figure, drawn, pad=32):
        axes.axhline(1, **reference())
        for peer in implementations(here):
            mine = [one for one in here if one.implementation == peer]
            speedups = [ratio(one, ours, "ms_p50") for one in mine]
            label = f"{peer} {statistics.geometric_mean(speedups):.2f}×"
            axes.plot([one.bytes_minimum for one in mine], speedups, label=label, **look(peer))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02))
        log_axes(axes, drawn, "times as fast", base=2, steps=(1, 1.5))
    return figure


def ratio(record: Record, ours: dict[Any, Record], field: str) -> float:
    """Return a field of a record over triton_gn's in the same case; 0 if either is missing."""
    divisor = getattr(ours.get(case(record)), field, None)
    return (getattr(record, field) or 0) / divisor if divisor else 0


def roofline(records: list[Record]) -> Figure | None:
    """Draw the speed of every workload below that of the copies or additions of its run."""
    scope = [one for one in cold(records) if one.implementation in (OURS, *REFERENCES.values())]
    drawn = [one for one in scope if one.implementation == OURS and one.gb_per_s]
    if not drawn:
        return None
    title = "Throughput of triton_gn beside that of a copy or an addition"
    figure = sheet(title, scope, 3.4, handles=roofline_key(drawn))
    for axes, here in panels(figure, drawn):
        roof = defaultdict(list)
        for one in scope:
            if one.implementation == REFERENCES[here[0].direction] and one.gb_per_s:
                roof[one.bytes_minimum].append(one.gb_per_s)
        sizes = sorted(roof)
        axes.plot(sizes, [statistics.median(roof[size]) for size in sizes], **reference())
        for one in here:
            axes.plot(one.bytes_minimum, one.gb_per_s or 0, **point_look(one))
        log_axes(axes, drawn, "GB/s", base=10, steps=(1, 2, 5))
    return figure


def point_look(record: Record) -> dict[str, Any]:
    """Return a marker of the roofline: colour is strategy, shape is layout, fill is bound."""
    fill = BOUNDS[record.bound or "dram"]
    shape = {"marker": LAYOUTS[record.layout], "fillstyle": fill, "markersize": 6}
    return look(f"{OURS}[{record.strategy}]") | shape


def roofline_key(records: list[Record]) -> list[Line2D]:
    """Return the legend of the strategies, layouts and bounds that occur, and of the roof."""
    swatch = {"marker": "", "linestyle": "-", "linewidth": 5}
    plain = reference() | {"linestyle": "none", "marker": "o"}
    by_strategy = sorted(records, key=lambda one: str(one.strategy))
    layouts = sorted({one.layout for one in records})
    bounds = sorted({one.bound for one in records if one.bound})
    roof = " or ".join(REFERENCES[name] for name in directions(records))
    looks = {
        **{str(one.strategy): point_look(one) | swatch for one in by_strategy},
        roof: reference(),
        **{layout: plain | {"marker": LAYOUTS[layout]} for layout in layouts},
        **{f"bound: {bound}": plain | {"fillstyle": BOUNDS[bound]} for bound in bounds},
    }
    return [Line2D([], [], label=label, **style) for label, style in looks.items()]


def memory(records: list[Record]) -> Figure | None:
    """Draw the peak memory of PyTorch's forward and backward over that of triton_gn's."""
    scope = [one for one in cold(records, "both") if one.implementation in (OURS, "torch_eager")]
    ours = {case(one): one for one in scope if one.implementation == OURS}
    drawn = [one for one in scope if one.implementation != OURS and ratio(one, ours, "peak_bytes")]
    if not drawn:
        return None
    names = labels(drawn)
    title = "Peak memory of PyTorch over that of triton_gn, forward and backward"
    figure = sheet(title, scope, 0.6 + 0.2 * len(names), notes=["the smallest tensor on top"])
    axes = figure.add_subplot()
    for row, one in enumerate(sorted(drawn, key=tensor_bytes)):
        saved = ratio(one, ours, "peak_bytes")
        peaks = " → ".join(size(peak.peak_bytes or 0) for peak in (one, ours[case(one)]))
        axes.barh(row, saved, color="C0", height=0.6)
        axes.text(saved, row, f" {saved:.2f}×: {peaks}", va="center", fontsize="small")
    axes.axvline(1, **reference())
    axes.grid(visible=False, axis="y")
    axes.set(xlim=(0, 1.5 * axes.dataLim.xmax), xlabel="times as much")  # room for the texts
    name_rows(axes, names.values())
    return figure


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def sweep(records: list[Record], name: str) -> Figure | None:
    """Draw the time of each block and number of warps over the best time of all."""
    timed = sorted((one for one in records if one.ms_p50), key=milliseconds)
    if not timed:
        return None
    cells = defaultdict(list)
    for one in timed:
        cells[block(one), setting(one, "num_warps")].append(one)
    blocks, warps = (sorted(set(values)) for values in zip(*cells, strict=True))
    best = timed[0]
    settings = (best.config or {}).items()
    config = ", ".join(f"{k} {v}" for k, v in settings if k not in ("default", "strategy"))
    figure = sheet(
        f"Sweep of {name}, {best.direction}: time over the best",
        records,
        0.6 + 0.36 * len(blocks),
        about=", ".join(words(best)[1:]),
        notes=[
            f"best: {1e3 * milliseconds(best):.4g} us, {best.strategy}, {config}",
            "each cell: its fastest plan",
            "default: the plan that triton_gn chooses by itself",
            "hatched: spills registers",
        ],
    )
    axes = figure.add_subplot()
    for (row, column), found in cells.items():
        draw_cell(axes, warps.index(column), blocks.index(row), found, best)
    axes.grid(visible=False)
    axes.set(xlim=(-0.5, len(warps) - 0.5), xlabel="num_warps")
    axes.set_xticks(range(len(warps)), map(str, warps))
    name_rows(axes, [f"{strategy}, {elements:,} elements" for strategy, elements in blocks])
    return figure


def draw_cell(axes: Axes, x: int, y: int, records: list[Record], best: Record) -> None:
    """Draw the fastest of a cell over the best of all, and mark the best and the default."""
    slowdown = milliseconds(records[0]) / milliseconds(best)
    color = matplotlib.colormaps["viridis_r"](LogNorm(1, MAX_SLOWDOWN, clip=True)(slowdown))
    ink = "#000000" if color[1] > 0.55 else "#ffffff"  # in viridis, green follows lightness
    defaults = [milliseconds(o) / milliseconds(best) for o in records if setting(o, "default")]
    marks = ", ".join(["best"] * (records[0] is best) + [f"default {d:.2f}" for d in defaults])
    box = {"facecolor": color, "linewidth": 0, "pad": 1}  # no hatches behind the text
    hatch = "////" if records[0].spill_bytes else ""
    paper = axes.get_facecolor()
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fc=color, ec=paper, hatch=hatch))
    if marks:
        frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, ec=ink, lw=1.5, zorder=4)
        axes.add_patch(frame)
    text = f"{slowdown:.2f}\n{marks}".strip()
    axes.text(x, y, text, color=ink, bbox=box, ha="center", va="center")


def block(record: Record) -> tuple[str, int]:
    return str(record.strategy), setting(record, "rows") * setting(record, "cols")


def setting(record: Record, name: str) -> Any:
    return (record.config or {}).get(name)


def milliseconds(record: Record) -> float:
    return record.ms_p50 or math.inf
