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
    scope = [r for r in cold(records) if r.implementation not in REFERENCES.values()]
    drawn = [record for record in scope if record.share_of_copy]
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
        mine = [record for record in records if record.implementation == implementation]
        heights = [rows.index(workload(record)) for record in mine]
        shares = [record.share_of_copy or 0 for record in mine]
        axes.plot(shares, heights, clip_on=False, **look(implementation))
    axes.set_xlabel(f"{REFERENCES[records[0].direction]} = 1")
    name_rows(axes, names.values())


def draw_curves(axes: Axes, records: list[Record], names: dict[Any, str]) -> None:
    axes.axhline(1, **reference())
    for implementation in reversed(implementations(records)):
        mine = [r for r in records if r.implementation == implementation]
        shares = sorted(record.share_of_copy or 0 for record in mine)
        steps = [100 * (step + 0.5) / len(shares) for step in range(len(shares))]
        axes.plot(steps, shares, **look(implementation) | {"linestyle": "-", "markevery": 0.1})
    axes.set_xlabel(f"% of {len(names)} workloads, slowest first")
    axes.set_ylabel(f"{REFERENCES[records[0].direction]} = 1")


def speedup(records: list[Record]) -> Figure | None:
    """Draw PyTorch's times over triton_gn's, with their geometric means."""
    scope = [record for record in records if record.implementation in (OURS, *PYTORCH)]
    ours = {case(record): record for record in scope if record.implementation == OURS}
    drawn = [r for r in scope if r.implementation != OURS and ratio(r, ours, "ms_p50")]
    if not drawn:
        return None
    figure = sheet(
        "Speed-up: time of PyTorch over time of triton_gn",
        scope,
        3.4 * len({record.cache for record in drawn}),
        notes=["beside the names: geometric means"],
    )
    for axes, here in panels(figure, drawn, pad=32):
        axes.axhline(1, **reference())
        for peer in implementations(here):
            mine = [record for record in here if record.implementation == peer]
            speedups = [ratio(record, ours, "ms_p50") for record in mine]
            label = f"{peer} {statistics.geometric_mean(speedups):.2f}×"
            axes.plot(
                [record.bytes_minimum for record in mine], speedups, label=label, **look(peer)
            )
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02))
        log_axes(axes, drawn, "times as fast", base=2, steps=(1, 1.5))
    return figure


def ratio(record: Record, ours: dict[Any, Record], field: str) -> float:
    """Return a field of a record over triton_gn's in the same case; 0 if either is missing."""
    divisor = getattr(ours.get(case(record)), field, None)
    return (getattr(record, field) or 0) / divisor if divisor else 0


def roofline(records: list[Record]) -> Figure | None:
    """Draw the speed of every workload below that of the copies or additions of its run."""
    scope = [r for r in cold(records) if r.implementation in (OURS, *REFERENCES.values())]
    drawn = [record for record in scope if record.implementation == OURS and record.gb_per_s]
    if not drawn:
        return None
    title = "Throughput of triton_gn beside that of a copy or an addition"
    figure = sheet(title, scope, 3.4, handles=roofline_key(drawn))
    for axes, here in panels(figure, drawn):
        roof = defaultdict(list)
        for record in scope:
            if record.implementation == REFERENCES[here[0].direction] and record.gb_per_s:
                roof[record.bytes_minimum].append(record.gb_per_s)
        sizes = sorted(roof)
        axes.plot(sizes, [statistics.median(roof[size]) for size in sizes], **reference())
        for record in here:
            axes.plot(record.bytes_minimum, record.gb_per_s or 0, **point_look(record))
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
    by_strategy = sorted(records, key=lambda record: str(record.strategy))
    layouts = sorted({record.layout for record in records})
    bounds = sorted({record.bound for record in records if record.bound})
    roof = " or ".join(REFERENCES[name] for name in directions(records))
    looks = {
        **{str(record.strategy): point_look(record) | swatch for record in by_strategy},
        roof: reference(),
        **{layout: plain | {"marker": LAYOUTS[layout]} for layout in layouts},
        **{f"bound: {bound}": plain | {"fillstyle": BOUNDS[bound]} for bound in bounds},
    }
    return [Line2D([], [], label=label, **style) for label, style in looks.items()]


def memory(records: list[Record]) -> Figure | None:
    """Draw the peak memory of PyTorch's forward and backward over that of triton_gn's."""
    scope = [r for r in cold(records, "both") if r.implementation in (OURS, "torch_eager")]
    ours = {case(record): record for record in scope if record.implementation == OURS}
    drawn = [r for r in scope if r.implementation != OURS and ratio(r, ours, "peak_bytes")]
    if not drawn:
        return None
    names = labels(drawn)
    title = "Peak memory of PyTorch over that of triton_gn, forward and backward"
    figure = sheet(title, scope, 0.6 + 0.2 * len(names), notes=["the smallest tensor on top"])
    axes = figure.add_subplot()
    for row, record in enumerate(sorted(drawn, key=tensor_bytes)):
        saved = ratio(record, ours, "peak_bytes")
        peaks = " → ".join(size(peak.peak_bytes or 0) for peak in (record, ours[case(record)]))
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
    timed = sorted((record for record in records if record.ms_p50), key=milliseconds)
    if not timed:
        return None
    cells = defaultdict(list)
    for record in timed:
        cells[block(record), setting(record, "num_warps")].append(record)
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
    for (row, column), cell in cells.items():
        draw_cell(axes, warps.index(column), blocks.index(row), cell, best)
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
