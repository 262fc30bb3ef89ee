"""Figures from results files: each as SVG and as PNG, for light pages and for dark ones.

Only records are read, so a figure can be drawn again anywhere, without a GPU.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.typing import RcKeyType

from perf.records import RESULTS, Record

FIGURES = Path("perf/figures")
OURS = "triton_gn"
PYTORCH = ("torch_compile", "torch_eager")
PROVIDERS = (OURS, *PYTORCH, "liger", "flag_gems", f"{OURS}[resident]", f"{OURS}[split]")
MARKERS = "oD^Pv<>X"  # in the order of PROVIDERS; the last is any other's
LAYOUTS = {"contiguous": "o", "channels_last": "s"}
BOUNDS = {"dram": "full", "l2": "left", "occupancy": "bottom", "launch": "none"}  # what is filled
REFERENCES = {"forward": "copy", "backward": "add"}  # they move as many bytes and do no more
DIRECTIONS = (*REFERENCES, "both")
MAX_ROWS = 30  # workloads that can have a row each
MAX_SLOWDOWN = 4  # where the colours of a sweep end
WIDTH = 8.0  # inches: about 800 pixels in a README
LINE = 0.17  # inches from one line of text to the next
MARGIN = 0.1  # inches

WORKLOAD = ("workload", "shape", "groups", "dtype", "param_dtype", "layout", "activation", "fused")
workload = attrgetter(*WORKLOAD)  # all that the calls of different providers have in common
case = attrgetter(*WORKLOAD, "direction", "cache")  # what two times must share to be compared


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


# Okabe and Ito's colours, which the colour-blind can tell apart, in the order of PROVIDERS; on
# GitHub's dark paper they are lighter. The two strategies differ in lightness as well: in the
# roofline their markers say something else.
LIGHT = "#d55e00 #56b4e9 #59636e #009e73 #cc79a7 #e69f00 #0072b2 #000000"
DARK = "#ff7f2a #a5dcff #b7bdc8 #1fc79a #e79ac4 #f2c14e #3f97dc #ffffff"
THEMES = {
    "light": theme("#ffffff", "#1f2328", "#818b98", "#d9dfe5", LIGHT),
    "dark": theme("#0d1117", "#f0f6fc", "#656c76", "#2a3038", DARK),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the paths to read and the folder to write to."""
    paths = f"results files, or folders of them (default: {RESULTS})"
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[RESULTS], metavar="PATH", help=paths
    )
    out = f"where the figures go (default: {FIGURES})"
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="FOLDER", help=out)


def run(options: argparse.Namespace) -> int:
    """Draw what the paths hold and print each file; return the exit status."""
    try:
        records = load(options.paths)
    except ValueError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    for path in draw(records, options.out):
        print(path)
    return 0


def load(paths: Sequence[Path]) -> list[Record]:
    """Return the records of results files and of folders of them.

    Raises:
        ValueError: there is no such path, there are no records, or a line is not a record.
    """
    records: list[Record] = []
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"a path must be a results file or a folder of them; there is no {path}. "
                "Name one that `python -m perf bench` wrote."
            )
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            records += parse(file)
    if not records:
        raise ValueError(
            f"there must be records to draw; got none in {', '.join(map(str, paths))}. "
            "Run `python -m perf bench` first."
        )
    return records


def parse(file: Path) -> Iterator[Record]:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            if line.strip():
                yield Record.from_json(line)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"each line must be a record as JSON; line {number} of {file} is not ({error}): "
                f"{line[:40]!r}. Delete the line and measure again."
            ) from error


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Write every figure that the records allow and print which they do not; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device, measured in sorted({(one.device, one.measured) for one in records}):
        chosen = [one for one in records if (one.device, one.measured) == (device, measured)]
        kind = "" if measured else "predicted-"
        for name, command, plot in plots(chosen):
            written = save(plot, f"{kind}{name}-{slug(device)}", folder)
            if not written:
                print(f"{kind}{name}: no data; `python -m perf {command}` on {device} measures it")
            paths += written
    return paths


def plots(records: list[Record]) -> Iterator[tuple[str, str, Callable[[], Figure | None]]]:
    """Return the name of each figure, the command that measures for it, and how to draw it."""
    benched, sweeps = divide(records)
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
            # no dates and versions: only other data make another file
            for suffix, unsaid in ("svg", ("Date", "Creator")), ("png", ("Software",)):
                paths.append(folder / f"{stem}-{name}.{suffix}")
                figure.savefig(paths[-1], metadata=dict.fromkeys(unsaid))
    return paths


def divide(records: list[Record]) -> tuple[list[Record], list[list[Record]]]:
    """Return what has one time per case and provider, and the sweeps; older times are left out.

    In a sweep, a strategy has more than one configuration at the same commit.
    """
    configs = defaultdict(set)
    for one in records:
        if one.provider.startswith(f"{OURS}["):
            configs[case(one), one.commit, one.provider].add(config_text(one))
    swept = {key[:2] for key, found in configs.items() if len(found) > 1}
    benched: dict[Any, Record] = {}
    sweeps: dict[Any, dict[Any, Record]] = defaultdict(dict)
    for one in sorted(records, key=lambda one: one.date):
        if one.provider.startswith(f"{OURS}[") and (case(one), one.commit) in swept:
            sweeps[case(one)][one.provider, config_text(one)] = one
        else:
            benched[case(one), one.provider] = one
    return list(benched.values()), [list(found.values()) for found in sweeps.values()]


def config_text(record: Record) -> str:
    return json.dumps(record.config, sort_keys=True)


def copy_share(records: list[Record]) -> Figure | None:
    """Draw the share of copy speed: a row per workload or, of many, each provider's curve."""
    scope = [one for one in cold(records) if one.provider not in REFERENCES.values()]
    drawn = [one for one in scope if one.share_of_copy]
    if not drawn:
        return None
    names = labels(drawn)
    few = len(names) <= MAX_ROWS
    figure = sheet(
        "Share of the speed of a copy (forward) / an addition (backward)",
        scope,
        0.6 + 0.2 * len(names) if few else 3.5,
        handles=[Line2D([], [], label=name, **look(name)) for name in providers(drawn)],
        notes=["the smallest tensor on top"] * few,
    )
    for axes, here in panels(figure, drawn):
        (draw_rows if few else draw_curves)(axes, here, names)
    (axes.set_xlim if few else axes.set_ylim)(0)  # last: the panels share their limits
    return figure


def draw_rows(axes: Axes, records: list[Record], names: dict[Any, str]) -> None:
    axes.axvline(1, **reference())
    rows = list(names)
    for provider in reversed(providers(records)):  # ours on top
        mine = [one for one in records if one.provider == provider]
        heights = [rows.index(workload(one)) for one in mine]
        shares = [one.share_of_copy or 0 for one in mine]
        axes.plot(shares, heights, clip_on=False, **look(provider))
    axes.set_xlabel(f"{REFERENCES[records[0].direction]} = 1")
    name_rows(axes, names.values())


def draw_curves(axes: Axes, records: list[Record], names: dict[Any, str]) -> None:
    axes.axhline(1, **reference())
    for provider in reversed(providers(records)):
        shares = sorted(one.share_of_copy or 0 for one in records if one.provider == provider)
        steps = [100 * (step + 0.5) / len(shares) for step in range(len(shares))]
        axes.plot(steps, shares, **look(provider) | {"linestyle": "-", "markevery": 0.1})
    axes.set_xlabel(f"% of {len(names)} workloads, slowest first")
    axes.set_ylabel(f"{REFERENCES[records[0].direction]} = 1")


def speedup(records: list[Record]) -> Figure | None:
    """Draw PyTorch's times over triton_gn's, with their geometric means."""
    scope = [one for one in records if one.provider in (OURS, *PYTORCH)]
    ours = {case(one): one for one in scope if one.provider == OURS}
    drawn = [one for one in scope if one.provider != OURS and ratio(one, ours, "ms_p50")]
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
        for peer in providers(here):
            mine = [one for one in here if one.provider == peer]
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
    scope = [one for one in cold(records) if one.provider in (OURS, *REFERENCES.values())]
    drawn = [one for one in scope if one.provider == OURS and one.gb_per_s]
    if not drawn:
        return None
    title = "Throughput of triton_gn beside that of a copy or an addition"
    figure = sheet(title, scope, 3.4, handles=roofline_key(drawn))
    for axes, here in panels(figure, drawn):
        roof = defaultdict(list)
        for one in scope:
            if one.provider == REFERENCES[here[0].direction] and one.gb_per_s:
                roof[one.bytes_minimum].append(one.gb_per_s)
        sizes = sorted(roof)
        axes.plot(sizes, [statistics.median(roof[size]) for size in sizes], **reference())
        for one in here:
            axes.plot(one.bytes_minimum, one.gb_per_s or 0, **point_look(one))
        log_axes(axes, drawn, "GB/s", base=10, steps=(1, 2, 5))
    return figure


def point_look(record: Record) -> dict[str, Any]:
    """Return the roofline's looks: colours say the strategy, shapes the layout, fill the bound."""
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
        **{layout: plain | {"marker": LAYOUTS[layout]} for layout in layouts},
        **{f"bound: {bound}": plain | {"fillstyle": BOUNDS[bound]} for bound in bounds},
        roof: reference(),
    }
    return [Line2D([], [], label=label, **style) for label, style in looks.items()]


def memory(records: list[Record]) -> Figure | None:
    """Draw the peak memory of PyTorch's forward and backward over that of triton_gn's."""
    scope = [one for one in cold(records, "both") if one.provider in (OURS, "torch_eager")]
    ours = {case(one): one for one in scope if one.provider == OURS}
    drawn = [one for one in scope if one.provider != OURS and ratio(one, ours, "peak_bytes")]
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
    config = ", ".join(
        f"{key} {value}" for key, value in (best.config or {}).items() if key != "rule"
    )
    figure = sheet(
        f"Sweep of {name}, {best.direction}: time over the best",
        records,
        0.6 + 0.36 * len(blocks),
        about=", ".join(words(best)[1:]),
        notes=[
            f"best: {milliseconds(best):.4g} ms, {best.strategy}, {config}",
            "rule: what triton_gn chooses by itself",
            "hatched: spills registers",
        ],
    )
    axes = figure.add_subplot()
    for (row, column), found in cells.items():
        draw_cell(axes, warps.index(column), blocks.index(row), found, milliseconds(best))
    axes.grid(visible=False)
    axes.set(xlim=(-0.5, len(warps) - 0.5), xlabel="num_warps")
    axes.set_xticks(range(len(warps)), map(str, warps))
    name_rows(axes, [f"{strategy}, {elements:,} elements" for strategy, elements in blocks])
    return figure


def draw_cell(axes: Axes, x: int, y: int, records: list[Record], best: float) -> None:
    """Draw the fastest of a cell over the best of all, and mark the best and the rule's choice."""
    slowdown = milliseconds(records[0]) / best
    color = matplotlib.colormaps["viridis_r"](LogNorm(1, MAX_SLOWDOWN, clip=True)(slowdown))
    ink = "#000000" if color[1] > 0.55 else "#ffffff"  # of viridis, green goes with lightness
    marks = ["best"] * (slowdown == 1)
    marks += [f"rule {milliseconds(one) / best:.2f}" for one in records if setting(one, "rule")]
    text = "\n".join((f"{slowdown:.2f}", *filter(None, [" = ".join(marks)])))
    box = {"facecolor": color, "linewidth": 0, "pad": 1}  # no hatches behind the text
    spills = bool(records[0].spill_bytes)
    cell: dict[str, Any] = {
        "facecolor": color,
        "edgecolor": axes.get_facecolor(),
        "hatch": "////" * spills,
    }
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **cell))
    if marks:
        frame: dict[str, Any] = {"fill": False, "edgecolor": ink, "linewidth": 1.5, "zorder": 4}
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, **frame))
    axes.text(x, y, text, color=ink, bbox=box, ha="center", va="center")


def block(record: Record) -> tuple[str, int]:
    return str(record.strategy), setting(record, "rows") * setting(record, "cols")


def setting(record: Record, name: str) -> Any:
    return (record.config or {}).get(name)


def milliseconds(record: Record) -> float:
    return record.ms_p50 or math.inf


def sheet(
    title: str,
    records: list[Record],
    height: float,
    *,
    about: str = "",
    handles: Sequence[Line2D] = (),
    notes: Sequence[str] = (),
) -> Figure:
    """Return a figure with its texts and legend, and room between them, of a height in inches.

    The texts say what it shows, where that comes from, and how many records are not drawn.
    """
    titles = textwrap.wrap(title, 72)
    if not all(one.measured for one in records):
        titles.append("predicted, not measured")
    skipped = Counter(one.provider for one in records if one.skipped)
    missing = ", ".join(f"{name} {skipped[name]}" for name in providers(records) if skipped[name])
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
    """Return where records come from: devices, dates, protocols, versions."""
    dates = sorted({one.date[:10] for one in records})
    caches = " and ".join(sorted({one.cache for one in records}))
    versions = {
        f"{name} {one.versions[name]}"
        for one in records
        for name in ("torch", "triton")
        if name in one.versions
    }
    said = [
        about,
        records[0].device,
        " to ".join(sorted({dates[0], dates[-1]})),
        f"{caches} L2",
        *sorted({one.protocol for one in records}),
        ", ".join(sorted(versions)),
    ]
    return [words for words in said if words]


def panels(
    figure: Figure, records: list[Record], pad: float = 6
) -> Iterator[tuple[Axes, list[Record]]]:
    """Return the panels and their records: directions side by side, caches below each other."""
    across, down = directions(records), sorted({one.cache for one in records})
    grid = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
    for row, cache in zip(grid, down, strict=True):
        for axes, direction in zip(row, across, strict=True):
            axes.set_title(f"{direction}, {cache} L2", pad=pad)
            yield axes, [one for one in records if (one.direction, one.cache) == (direction, cache)]


def cold(records: list[Record], *among: str) -> list[Record]:
    wanted = among or REFERENCES
    return [one for one in records if one.cache == "cold" and one.direction in wanted]


def directions(records: list[Record]) -> list[str]:
    return [name for name in DIRECTIONS if any(one.direction == name for one in records)]


def providers(records: list[Record]) -> list[str]:
    found = {one.provider for one in records}
    return [name for name in PROVIDERS if name in found] + sorted(found - set(PROVIDERS))


def labels(records: Iterable[Record]) -> dict[Any, str]:
    """Return the workloads by size, each with its name and what tells it from its namesakes."""
    said = {workload(one): words(one) for one in sorted(records, key=tensor_bytes)}
    names = {}
    for key, mine in said.items():
        namesakes = [theirs for theirs in said.values() if theirs[0] == mine[0]]
        columns = zip(*namesakes, strict=True)
        different = [len(set(column)) > 1 for column in columns]
        names[key] = ", ".join([mine[0], *itertools.compress(mine, different)])
    return names


def words(record: Record) -> list[str]:
    """Return the fields of a workload, said so that they need no heading."""
    fused = " ".join(["fused", *record.fused]) if record.fused else "nothing fused"
    sizes = [record.shape, f"{record.groups} groups"]
    types = [record.dtype, f"{record.param_dtype} parameters", record.layout]
    return [record.workload, *sizes, *types, f"activation {record.activation}", fused]


def tensor_bytes(record: Record) -> int:
    bits = re.findall(r"\d+", record.dtype)[0]
    return math.prod(map(int, record.shape.split("x"))) * int(bits) // 8


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def look(provider: str) -> dict[str, Any]:
    """Return how a provider is drawn: ours is the largest, a strategy of ours hollow."""
    index = PROVIDERS.index(provider) if provider in PROVIDERS else len(PROVIDERS)
    return {
        "color": f"C{index}",
        "fillstyle": "none" if "[" in provider else "full",
        "linestyle": "none",
        "marker": MARKERS[index],
        "markersize": 8 if provider == OURS else 5.5,
    }


def reference() -> dict[str, Any]:
    """Return how a line to compare with is drawn."""
    return {"color": matplotlib.rcParams["text.color"], "linestyle": "--", "linewidth": 1}


def name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Name the rows 0, 1, ... from the top."""
    rows = list(names)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def log_axes(
    axes: Axes, records: list[Record], label: str, base: float, steps: Sequence[float]
) -> None:
    """Make both axes logarithmic: bytes, across two powers of ten or more, and the label's."""
    least, most = (pick(max(1, one.bytes_minimum) for one in records) for pick in (min, max))
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
