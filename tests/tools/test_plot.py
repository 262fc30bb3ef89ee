"""The plots, of records made up here: which figures there are, and what they say."""

import html
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from perf import figures, plot, sheet
from perf.__main__ import main
from perf.records import REFERENCES, Record, save

ROOT = Path(__file__).parents[2]
CALL = Record(
    measured=True,
    command="bench",
    device="Test GPU",
    workload="small",
    shape="2x64x8x8",
    groups=32,
    dtype="float16",
    param_dtype="float32",
    layout="contiguous",
    activation="silu",
    direction="forward",
    implementation="triton_gn",
    strategy="resident",
    ms_p50=1.0,
    bytes_minimum=10**6,
    protocol="median of 9 calls",
    versions={"torch": "2.11.0", "triton": "3.6.0"},
    date="2026-01-02T03:04:05",
)


def record(**changes: Any) -> Record:
    return replace(CALL, **changes)


def eager(**changes: Any) -> Record:
    return record(implementation="torch_eager", strategy=None, **changes)


def candidate(ms: float | None, warps: int, *, splits: int = 1, **changes: Any) -> Record:
    """One of a sweep."""
    config = {"rows": 4, "cols": 64, "num_warps": warps, "splits": splits}
    config |= {name: changes.pop(name) for name in ("rows", "default") if name in changes}
    values = {
        "command": "sweep",
        "implementation": "triton_gn[split]",
        "strategy": "split",
        "config": config,
        "ms_p50": ms,
    }
    return record(**values | changes)


BENCH = [
    record(share_of_copy=0.9),
    eager(ms_p50=2.0),
    record(direction="both", peak_bytes=2**31),
    eager(direction="both", peak_bytes=2**32),
]


def drawn(name: str, records: list[Record]) -> Figure:
    """The figure whose name begins so, as a light page shows it."""
    with matplotlib.rc_context(sheet.THEMES["light"]):
        (found,) = (draw() for title, _, draw in plot.plots(records) if title.startswith(name))
    assert found is not None
    return found


def texts(figure: Figure) -> dict[str, Text]:
    return {one.get_text(): one for one in figure.findobj(Text) if isinstance(one, Text)}


def points(figure: Figure, panel: int = 0, linestyle: str = "None") -> list[list[float]]:
    """Return the points of a panel's lines of a style, by default of its markers."""
    lines = [one for one in figure.axes[panel].get_lines() if one.get_linestyle() == linestyle]
    return sorted(point for line in lines for point in np.asarray(line.get_xydata()).tolist())


def svg_text(path: Path) -> str:
    return html.unescape(" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())))


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without content, in no time."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **options: path.touch())
    monkeypatch.setattr(plot, "shrink", lambda png: None)


def test_a_figure_is_four_files(tmp_path: Path) -> None:
    paths = plot.draw([record(share_of_copy=0.5)], tmp_path / "new")
    assert sorted(path.name for path in paths) == [
        f"{name}-test-gpu-{end}"
        for name in ("copy-share", "roofline")
        for end in ("dark.png", "dark.svg", "light.png", "light.svg")
    ]
    assert set(paths) == set((tmp_path / "new").iterdir())
    colors = {"light": ("#ffffff", "#d55e00"), "dark": ("#0d1117", "#ff7f2a")}
    for page, (paper, ours) in colors.items():
        figure = tmp_path / "new" / f"copy-share-test-gpu-{page}"
        assert f"fill: {paper}" in figure.with_suffix(".svg").read_text()
        pixels = np.asarray(Image.open(figure.with_suffix(".png")).convert("RGB"), int)
        for color in (paper, ours):  # which the palette has
            assert (
                np.abs(pixels - [int(color[i : i + 2], 16) for i in (1, 3, 5)]).max(-1).min() <= 1
            )


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(
    ("records", "names"),
    [
        pytest.param(BENCH, {"copy-share", "speedup", "roofline", "memory"}, id="bench"),
        pytest.param(BENCH[:1], {"copy-share", "roofline"}, id="no peer"),
        pytest.param([record(cache="warm", share_of_copy=1.0)], set(), id="only warm"),
        pytest.param([candidate(1, 4), candidate(2, 8)], {"sweep-small-forward"}, id="sweep"),
        pytest.param(
            [candidate(1, 4, cache="warm"), candidate(2, 8, cache="warm")],
            {"sweep-small-forward-warm"},
            id="warm sweep",
        ),
        pytest.param(
            [candidate(1, n, share_of_copy=0.5, command="bench") for n in (4, 8)],
            {"copy-share"},
            id="forced strategies are no sweep",
        ),
    ],
)
def test_figures_follow_the_data(tmp_path: Path, records: list[Record], names: set[str]) -> None:
    paths = plot.draw(records, tmp_path)
    assert {path.name for path in paths if path.name.endswith("light.svg")} == {
        f"{name}-test-gpu-light.svg" for name in names
    }


@pytest.mark.usefixtures("unwritten")
def test_says_which_command_gives_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.draw([record(ms_p50=None, skipped="absent")], tmp_path) == []
    names = {"copy-share": "bench", "speedup": "bench", "roofline": "bench", "memory": "bench"}
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: no data; `python -m perf {command}` on Test GPU measures it"
        for name, command in {**names, "sweep": "sweep"}.items()
    ]


def test_predictions_and_devices_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "THEMES", {"light": sheet.THEMES["light"]})  # half the time
    records = [
        record(workload="here", share_of_copy=0.5),
        record(workload="modelled", share_of_copy=0.5, measured=False, bound="l2"),
        record(workload="there", share_of_copy=0.5, device="GPU (B)"),
    ]
    paths = plot.draw(records, tmp_path)
    for name, workload in {
        "copy-share-test-gpu": "here",
        "predicted-copy-share-test-gpu": "modelled",
        "copy-share-gpu-b": "there",
    }.items():
        path = tmp_path / f"{name}-light.svg"
        assert path in paths
        said = svg_text(path)
        assert re.findall("here|modelled|there", said) == [workload]
        assert ("predicted, not measured" in said) == (workload == "modelled")


def test_says_where_it_is_from() -> None:
    records = [record(share_of_copy=0.5), eager(share_of_copy=0.5, date="2026-02-03")]
    said = " ".join(texts(drawn("copy", records)))
    for part in ("Test GPU", "2026-01-02 to 2026-02-03", "cold L2", "median of 9 calls"):
        assert part in said
    assert "torch 2.11.0, triton 3.6.0" in said


def test_svg_depends_on_the_data_alone(tmp_path: Path) -> None:
    bounds = [record(measured=False, bound=bound, workload=bound) for bound in figures.BOUNDS]
    save(tmp_path / "predicted" / "records.jsonl", bounds)
    code = (
        "import pathlib, sys; from perf import plot; folder = pathlib.Path(sys.argv[1])\n"
        "plot.draw(plot.load([folder]), folder)\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=environment, check=True)
    paths = [path for path in plot.draw(bounds, tmp_path / "again") if path.suffix == ".svg"]
    assert len(paths) == 2
    for path in paths:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_newest_of_a_call_is_drawn() -> None:
    records = [
        record(share_of_copy=0.75, date="2026-03-01"),
        record(share_of_copy=0.5, date="2026-02-01"),
    ]
    assert points(drawn("copy", records)) == [[0.75, 0]]


def test_speedups_and_their_geometric_mean() -> None:
    records = [
        *(record(ms_p50=2.0), eager(ms_p50=4.0)),
        *(record(ms_p50=1.0, layout="channels_last"), eager(ms_p50=8.0, layout="channels_last")),
        *(record(ms_p50=1.0, workload="alone"), eager(ms_p50=64.0, shape="1x64x8x8")),
        *(record(ms_p50=1.0, cache="warm"), eager(ms_p50=0.5, cache="warm")),
    ]
    figure = drawn("speedup", records)
    assert points(figure) == [[1e6, 2], [1e6, 8]]
    assert points(figure, 1) == [[1e6, 0.5]]
    assert {"forward, cold L2", "torch_eager 4.00×", "torch_eager 0.50×"} <= texts(figure).keys()


def test_skipped_records_are_counted() -> None:
    records = [
        record(share_of_copy=0.5),
        *(record(implementation="liger", skipped="wrong", direction=one) for one in REFERENCES),
        record(implementation="flag_gems", skipped="absent"),
        record(implementation="liger", skipped="wrong", cache="warm"),
    ]
    said = texts(drawn("copy", records))
    assert "the smallest tensor on top · not drawn: liger 2, flag_gems 1" in said
    assert "liger" not in said


@pytest.mark.parametrize("count", [figures.MAX_ROWS, figures.MAX_ROWS + 1])
def test_many_workloads_become_a_curve(count: int) -> None:
    shares = [(7 * row % count + 1) / count for row in range(count)]
    records = [
        record(share_of_copy=share, shape=f"{row + 1}x64x8x8") for row, share in enumerate(shares)
    ]
    figure = drawn("copy", list(reversed(records)))
    named = [text for text in texts(figure) if text.startswith("small, ")]
    if count > figures.MAX_ROWS:
        assert [share for _, share in points(figure, linestyle="-")] == sorted(shares)
        assert not named
    else:  # a row each, by size
        assert {row: share for share, row in points(figure)} == dict(enumerate(shares))
        assert named == [f"small, {row + 1}x64x8x8" for row in range(count)]


def test_the_roof_is_the_copy_of_each_size() -> None:
    copies = [
        record(implementation="copy", ms_p50=ms, bytes_minimum=size, groups=groups)
        for groups, (ms, size) in enumerate(
            ((1.0, 10**6), (0.5, 10**6), (0.2, 10**6), (1.0, 10**5))
        )
    ]
    adds = [record(implementation="add", direction="backward"), record(direction="backward")]
    figure = drawn("roofline", [record(ms_p50=4.0), *copies, *adds])
    assert points(figure) == [[1e6, 0.25]]
    assert points(figure, linestyle="--") == [[1e5, 0.1], [1e6, 2.0]]


def test_saved_memory() -> None:
    figure = drawn("memory", BENCH)
    assert " 2.00×: 4.00 GiB → 2.00 GiB" in texts(figure)
    assert [bar.get_width() for bar in figure.axes[0].patches if isinstance(bar, Rectangle)] == [2]


def test_sweep_marks_the_best_the_default_and_spills() -> None:
    records = [
        candidate(2.0, 4),
        candidate(1.0, 4, splits=2),
        candidate(9.0, 4, splits=3, spill_bytes=8),
        candidate(1.5, 8, spill_bytes=8),
        candidate(3.0, 4, rows=8, default=True),
        candidate(2.5, 4, rows=8, splits=2),
        candidate(None, 8, rows=8, skipped="does not fit"),
    ]
    figure = drawn("sweep-small-forward", records)
    said = texts(figure)
    cells = {"1.00\nbest": (0, 0), "1.50": (1, 0), "2.50\ndefault 3.00": (0, 1)}
    assert {text: said[text].get_position() for text in cells} == cells
    hatched = [one for one in figure.axes[0].patches if one.get_hatch()]
    assert [one.get_xy() for one in hatched if isinstance(one, Rectangle)] == [(0.5, -0.5)]
    assert {"split, 256 elements", "split, 512 elements"} <= said.keys()
    (footer,) = (text for text in said if text.startswith("best: "))
    assert "1000 us, split, rows 4, cols 64, num_warps 4, splits 2" in footer
    assert "not drawn: triton_gn[split] 1" in footer.replace("\n", " ")


def test_pictures_of_the_docs_are_there_and_predicted() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    section = text.partition("\n## Predicted, not measured\n")[2].partition("\n## ")[0]
    pictures = re.findall(r'"([^"]+\.png)"', text)
    assert pictures
    assert pictures == re.findall(r'"([^"]+\.png)"', section)
    for picture in pictures:
        assert Path(picture).name.startswith("predicted-")
        assert (ROOT / "docs" / picture).is_file()


@pytest.mark.usefixtures("unwritten")
def test_run_reads_a_folder_and_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "results" / "below" / "a.jsonl", [record()])
    out = tmp_path / "out"
    assert main(["plot", str(tmp_path / "results"), "--out", str(out)]) == 0
    assert f"{out / 'roofline-test-gpu-light.svg'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "there is no {file}. Name one", id="no such path"),
        pytest.param("\n", "there must be records to draw; got none in {file}", id="no records"),
        pytest.param("{good}\n{", "line 2 of {file} is not (Expecting", id="not JSON"),
        pytest.param("\n[1]", "line 2 of {file} is not (", id="not an object"),
        pytest.param('{"device": 1}', "line 1 of {file} is not (", id="fields missing"),
    ],
)
def test_errors_name_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "results.jsonl"
    if content is not None:
        file.write_text(content.replace("{good}", record().to_json()))
    assert main(["plot", str(file), "--out", str(tmp_path / "out")]) == 2
    assert message.replace("{file}", str(file)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
